/* One header alone, -DHEADER=<NAME>, for the strictest compiler: it includes all that it needs. */
#include HEADER

int main(void) { return 0; }
