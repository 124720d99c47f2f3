"""The Python package of this workflow: the clone's own, or the installed one where Snakemake fetched the workflow file by file.

In: this file's own place, which `workflow.basedir` is not in a module of another workflow. Out: IS_MODULE, the package imported,
SCHEMA. Nothing is left in the path of modules or in the environment, where it would shadow another workflow's modules: scripts
look beside themselves first.
"""

import os
import re
import sys
from importlib import import_module
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

IS_MODULE = not workflow.modifier.is_main_snakefile()
RULES_FOLDER = workflow.current_basedir
SCRIPTS = os.path.normpath(os.path.join(RULES_FOLDER.get_path_or_uri(secret_free=True), "../../scripts"))
IS_FETCHED = not os.path.isdir(SCRIPTS)


def has_conda_environments():
    """Whether rules run in conda environments, and not in this process's."""
    return DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method


def source(path):
    """The local path of a file of this workflow, given relative to this folder."""
    if IS_FETCHED:
        return str(workflow.source_path(path))
    return os.path.normpath(os.path.join(RULES_FOLDER.get_path_or_uri(secret_free=True), path))


def requirement():
    """What pip installs for a fetched workflow: the same revision of the same repository."""
    place = getattr(RULES_FOLDER, "repo", None)
    place = (
        f"https://{RULES_FOLDER.host}/{place}" if place else f"file://{getattr(RULES_FOLDER, 'repo_path', '<clone>')}"
    )
    return f"lengthwise[workflow] @ git+{place}@{getattr(RULES_FOLDER, 'ref', '<version>')}"


def import_package():
    """Import the package.

    Returns
    -------
    Why it is unusable, in a line; empty if it is not.
    """
    before = sys.path[:]
    if not IS_FETCHED:
        sys.path.insert(0, SCRIPTS)
    try:
        import_module("lengthwise")
    except ModuleNotFoundError as error:
        if error.name != "lengthwise":
            raise
        return (
            "this workflow was fetched file by file, without its Python package: where Snakemake runs, "
            f"pip install {requirement()!r}, or give the path of a clone as snakefile"
        )
    finally:
        sys.path[:] = before
    found = sys.modules["lengthwise"]
    wanted = re.search(r'"(.+?)"', Path(source("../../scripts/lengthwise/_version.py")).read_text().split("=")[-1])[1]
    if found.__version__ != wanted:
        return (
            f"this workflow is of version {wanted}, and Python has imported the package of version {found.__version__} "
            f"({Path(found.__file__).parent}); "
            + (f"pip install {requirement()!r}" if IS_FETCHED else "import no other one before the workflow")
        )
    if IS_FETCHED and has_conda_environments():
        return "the conda environments lack the package of a fetched workflow; give the path of a clone as snakefile"
    return ""


if why := import_package():
    sys.exit(f"lengthwise: error: {why}")

SCHEMA = Path(source("../schemas/config.schema.yaml"))
