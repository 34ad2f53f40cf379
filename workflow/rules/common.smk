# Loads and validates the config; names paths and wildcards. No science here.
import re
import sys
from pathlib import Path

from moe_routing.config.cells import CELLS, cells_of
from moe_routing.config.study import StudyConfig
from moe_routing.config.replications import check_replications
from moe_routing.errors import InputError
from moe_routing.statistics.columns import TABLES
from moe_routing.workflow import (
    check_known_model,
    checkout_of,
    config_origin,
    dataset_of,
    finished_elsewhere,
    job_image,
    job_prefix,
    located,
    model_environment,
    model_files,
    raw_file,
    refuse_dollar,
    refuse_templates,
    report_environment,
    sections,
    source_section,
    validate_config,
    write_config,
    write_run,
)

try:
    # The folder of the root Snakefile, also where workflow/Snakefile is the main file or a module.
    CHECKOUT = checkout_of(workflow.current_basedir.get_path_or_uri(secret_free=True))
    refuse_templates(workflow.configfiles)
    given, files = workflow.config_settings.config, workflow.configfiles
    study = located(validate_config(StudyConfig, config, given, files), CHECKOUT)
    RESULTS = f"results/{study.study}"
    check_known_model(study, Path(RESULTS), config_origin(given, files))
    IMAGE = job_image(CHECKOUT, workflow.deployment_settings.deployment_method)
    # A copy of a finished study, on a machine that cannot make it again.
    OWN_PYTHON = not workflow.deployment_settings.deployment_method
    FINISHED_ELSEWHERE = finished_elsewhere(study, Path(RESULTS), own_python=OWN_PYTHON)
    if not FINISHED_ELSEWHERE:
        check_replications(study.replications, study.study, config_origin(given, files))
except InputError as error:
    sys.exit(f"error: {error}")
# Captions of the report read the raw config, which may leave this key to its default.
config["statistics"]["baseline"] = study.statistics.baseline

CONFIG = f"{RESULTS}/config.yaml"
MODEL_ENVIRONMENT = model_environment(study.resources.gpu)
REPORT_ENVIRONMENT = report_environment()
shell.prefix(
    job_prefix(
        CHECKOUT,
        own_python=OWN_PYTHON,
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        MPLBACKEND="agg",
    )
)


container: IMAGE


def doubled(amount):
    """Return the memory or the runtime of a job, doubled at every retry."""
    return lambda wildcards, attempt: amount * 2 ** (attempt - 1)


def compared_cells(*kinds):
    """Return the files of all cells of the comparison, with these suffixes."""
    cells = [cell.path for cell in cells_of(study) if cell.part == CELLS]
    return expand(f"{RESULTS}/{{cell}}.{{kind}}", cell=cells, kind=kinds)


wildcard_constraints:
    part="cells|numerics",
    name="|".join(map(re.escape, [*study.parsed, *(arm.name for arm in study.numerics)])),
    strategy="|".join(map(re.escape, study.parsed)),
    budgeted="|".join(map(re.escape, study.budgeted)) or "none",
    dataset="|".join(study.datasets),
    null="|".join(study.calibration.nulls),
    file=r"[^/]+",


# The complete config, as one file for the jobs. Were it the output of a rule, the jobs behind that
# rule would not be asked whether their own settings have changed.
onstart:
    try:
        if not workflow.local_exec:
            refuse_dollar(Path.cwd())
    except InputError as error:
        sys.exit(f"error: {error}")
    write_config(study, CONFIG)
    write_run(
        workflow.configfiles,
        changed=bool(workflow.config_settings.config),
        path=Path(f"{RESULTS}/run.json"),
    )
