"""All metadata stands in setup.cfg; here only what it cannot say: ds_configs/ ships inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["redheart*"]), "redheart.ds_configs"],
    package_dir={"redheart.ds_configs": "ds_configs"},
    package_data={
        "redheart": ["presets/*.yaml"],
        "redheart.data": ["corpus/*.json"],
        "redheart.evaluation": ["page.html"],
        "redheart.optim": ["csrc/*.cpp", "csrc/*.h"],
        "redheart.signals": ["csrc/*.cpp", "csrc/*.h"],
        "redheart.ds_configs": ["*.json"],
    },
)
