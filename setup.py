import platform

from setuptools import Extension, setup

# Snapshots of host memory take a third less time with it. Where it cannot be built torch copies them.
nontemporal = Extension(
    "trainbus.checkpoint._nontemporal",
    ["trainbus/checkpoint/_nontemporal.c"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    extra_compile_args=["-O2", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)
has_sse2 = platform.machine() in ("x86_64", "AMD64")

setup(
    ext_modules=[nontemporal] if has_sse2 else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if has_sse2 else {},
)
