# The GPU jobs: one strategy on one evaluation set (a cell), or the baseline under a numerics arm on
# one. A finished cell is in the study's store as well, which Snakemake does not touch. A job whose
# cell is there copies it; another one scores its own, and others in passing.
from moe_routing.config.cells import Cell, cell_files, uses_calibration
from moe_routing.evaluation.pieces import cell_piece
from moe_routing.workflow import in_results


rule evaluate:
    input:
        files=lambda wildcards: in_results(RESULTS, cell_files(study, Cell(*wildcards))),
        # Nothing that is calibrated is scored on a set before the two are known to share nothing.
        checked=lambda wildcards: ancient(
            f"{RESULTS}/data/overlap/{wildcards.dataset}.json"
            if uses_calibration(study, Cell(*wildcards))
            else []
        ),
    output:
        table=f"{RESULTS}/{{part}}/{{name}}/{{dataset}}.parquet",
        record=f"{RESULTS}/{{part}}/{{name}}/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/evaluate/{{part}}/{{name}}/{{dataset}}.log",
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime * study.resources.strategies_per_job),
        gpu=study.resources.gpu,
    params:
        settings=lambda wildcards: cell_piece(study, Cell(*wildcards)).settings,
        results=subpath(output[0], ancestor=3),
    message:
        "Scoring {wildcards.name} on {wildcards.dataset} ({threads} threads, gpu={resources.gpu})"
    shell:
        'python "$SCRIPTS/evaluate.py" --results {params.results:q} '
        "--cell {wildcards.part:q}/{wildcards.name:q}/{wildcards.dataset:q} "
        "--settings {params.settings:q} --inputs {input.files:q} 2> {log:q}"
