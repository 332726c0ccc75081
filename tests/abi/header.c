/* The header alone, for the strictest compiler: it includes all that it needs. */
#include <diffusionz_c_api.h>

int main(void) { return 0; }
