"""Writes the C source of the Python binding: make_binding.py HEADER... OUT.c

The declarations are the headers' own lines between their two `cdef:` marks, so there is no second copy that could
drift; the C compiler checks every struct and prototype against the headers again when the source is compiled (cffi's
API mode).
"""

import os
import sys

import cffi


def main() -> None:
    *headers, out = sys.argv[1:]
    builder = cffi.FFI()
    for header in headers:
        with open(header, encoding="utf-8") as file:
            text = file.read()
        begin, end = text.index("/* cdef: begin"), text.index("/* cdef: end */")
        builder.cdef(text[begin:end].replace("DIFFUSIONZ_API ", ""))
    builder.set_source("diffusionz._diffusionz", "".join(f'#include "{os.path.basename(h)}"\n' for h in headers))
    builder.emit_c_code(out)


main()
