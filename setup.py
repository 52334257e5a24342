import platform
import sysconfig

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
# Free-threaded interpreters have no stable ABI.
is_built = platform.machine() in ("x86_64", "AMD64") and not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[nontemporal] if is_built else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if is_built else {},
)
