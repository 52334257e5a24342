import platform
import sysconfig

from setuptools import Extension, setup


def extension(name: str) -> Extension:
    """Return an extension that an installation can do without."""
    return Extension(
        f"trainbus.checkpoint.{name}",
        [f"trainbus/checkpoint/{name}.c"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        extra_compile_args=["-O2", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,
    )


# With it the writer of thousands of tensors seldom keeps the training from the interpreter.
extensions = [extension("_writing")]
if platform.machine() in ("x86_64", "AMD64"):
    # Snapshots of host memory take a third less time with it. Where it cannot be built torch copies them.
    extensions.append(extension("_nontemporal"))
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    extensions.clear()  # free-threaded interpreters have no stable ABI

setup(
    ext_modules=extensions,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
