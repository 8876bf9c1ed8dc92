"""What setup.cfg cannot say: an installed cfjax carries configs/ in itself, where cfjax.core.cli finds them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["cfjax*"]), "cfjax.configs"], package_dir={"cfjax.configs": "configs"})
