"""`diffusionz bench`: how fast this machine's GPU is, and what a lower precision costs in quality."""
