"""Writes the C source of the Python binding: make_binding.py HEADER OUT.c

The declarations are the header's own lines between its two `cdef:` marks, so there is no second copy that could drift;
the C compiler checks every struct and prototype against the header again when the source is compiled (cffi's API mode).
"""

import sys

import cffi


def main() -> None:
    header, out = sys.argv[1:]
    with open(header, encoding="utf-8") as file:
        text = file.read()
    begin, end = text.index("/* cdef: begin"), text.index("/* cdef: end */")
    builder = cffi.FFI()
    builder.cdef(text[begin:end].replace("DIFFUSIONZ_API ", ""))
    builder.set_source("diffusionz._diffusionz", '#include "diffusionz_c_api.h"\n')
    builder.emit_c_code(out)


main()
