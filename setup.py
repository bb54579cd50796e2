"""All metadata stands in setup.cfg; here only what it cannot say: everything that is no module ships beside them, and ds_configs/ too."""

from pathlib import Path

from setuptools import find_packages, setup

package = Path(__file__).parent / "redheart"
modules = {p for folder in package.rglob("__init__.py") for p in folder.parent.glob("*.py")}
beside = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".so", ".o") and p not in modules]

setup(
    packages=[*find_packages(include=["redheart*"]), "redheart.ds_configs"],
    package_dir={"redheart.ds_configs": "ds_configs"},
    package_data={
        # presets, corpus, kernels' sources, templates, py.typed
        "redheart": sorted(str(p.relative_to(package)) for p in beside),
        "redheart.ds_configs": ["*.json"],
    },
)
