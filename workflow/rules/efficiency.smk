# How long a fixed text takes under every strategy, and how many experts a batch of tokens needs.
from moe_routing.config.cells import TIMING_FILE, UNIQUE_FILE, calibration_files, measured
from moe_routing.vocabulary import text_dataset
from moe_routing.workflow import in_results


rule efficiency:
    input:
        model=f"{RESULTS}/model.json",
        text=f"{RESULTS}/data/{text_dataset(study.datasets)}.parquet",
        calibration=in_results(RESULTS, calibration_files(study, measured(study))),
    output:
        in_results(RESULTS, [TIMING_FILE, UNIQUE_FILE]),
    log:
        f"{RESULTS}/logs/efficiency.log",
    benchmark:
        f"{RESULTS}/benchmarks/efficiency.tsv"
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "analysis.efficiency",
            "evaluation.window",
            "statistics.baseline",
            "seed",
        ),
        strategies=measured(study),
        results=subpath(input.model, parent=True),
    message:
        "Timing every strategy, and counting the experts of batches"
    shell:
        'python "$SCRIPTS/efficiency.py" --results {params.results:q} 2> {log:q}'
