"""diffusionz.server: the models over HTTP, with jobs, a page, and prepaid credit.

`diffusionz serve` runs it; `diffusionz.server.app.create_app` makes the ASGI application of the parts.
"""
