"""Maps the top-level folders to packages; everything else stands in pyproject.toml.

`kernels/` is installed as `rgpb.kernels`: as a top-level module its name would collide with another package's.
"""

from setuptools import find_packages, setup

library = find_packages(include=["rgpb", "rgpb.*"])
row_kernels = [f"rgpb.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(packages=library + row_kernels, package_dir={"rgpb": "rgpb", "rgpb.kernels": "kernels"})
