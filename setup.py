"""The native kernels; everything else is in pyproject.toml. Without a C++ compiler spp installs without them."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("src/spp/ops/native")

setup(
    ext_modules=[
        Extension(
            "spp.ops.native._kernels",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            language="c++",
            # No contraction of a * b + c: what is trained must have the bits of what is merged.
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-ffp-contract=off",
                "-fno-exceptions",
                "-fno-rtti",
                "-fno-threadsafe-statics",
                "-fvisibility=hidden",
                "-g0",
            ],
            optional=True,
        )
    ]
)
