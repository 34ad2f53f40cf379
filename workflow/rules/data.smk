# Items of the evaluation sets, and calibration text that shares nothing with them.
from moe_routing.data.sources import sets_apart


rule prepare_dataset:
    input:
        raw=lambda wildcards: raw_file(study, RESULTS, wildcards.dataset),
    output:
        f"{RESULTS}/data/{{dataset}}.parquet",
    log:
        f"{RESULTS}/logs/prepare_dataset/{{dataset}}.log",
    # All of the calibration waits for it.
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=15,
    params:
        settings=lambda wildcards: sections(study, f"datasets.{wildcards.dataset}", "seed"),
        raw=subpath(input.raw, parent=True),
        config=CONFIG,
    message:
        "Preparing {wildcards.dataset}"
    shell:
        'python "$SCRIPTS/prepare_data.py" --config {params.config:q} --dataset {wildcards.dataset:q} '
        "--raw {params.raw:q} --out {output:q} 2> {log:q}"


rule prepare_calibration:
    input:
        raw=raw_file(study, RESULTS, "calibration"),
        # Text is drawn once, apart from the sets of that time; others are checked below. A change of
        # a set is thus no reason to calibrate again.
        data=ancient(
            expand(
                f"{RESULTS}/data/{{dataset}}.parquet",
                dataset=sets_apart(study, Path(RESULTS) / "data"),
            )
        ),
    output:
        texts=f"{RESULTS}/data/calibration.parquet",
        certification=f"{RESULTS}/data/certification.parquet",
        manifest=f"{RESULTS}/data/calibration.json",
    log:
        f"{RESULTS}/logs/prepare_calibration.log",
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=15,
    params:
        settings=sections(
            study, "calibration.source", "calibration.tokens", "calibration.documents", "seed"
        ),
        raw=subpath(input.raw, parent=True),
        config=CONFIG,
    message:
        "Preparing calibration text"
    shell:
        'python "$SCRIPTS/prepare_data.py" --config {params.config:q} --dataset calibration '
        "--raw {params.raw:q} --out {output.texts:q} 2> {log:q}"


rule check_overlap:
    input:
        raw=lambda wildcards: raw_file(study, RESULTS, wildcards.dataset),
        data=f"{RESULTS}/data/{{dataset}}.parquet",
        texts=rules.prepare_calibration.output.texts,
        certification=rules.prepare_calibration.output.certification,
        manifest=rules.prepare_calibration.output.manifest,
    output:
        f"{RESULTS}/data/overlap/{{dataset}}.json",
    log:
        f"{RESULTS}/logs/check_overlap/{{dataset}}.log",
    conda:
        MODEL_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=15,
    params:
        raw=subpath(input.raw, parent=True),
        config=CONFIG,
    message:
        "Checking that {wildcards.dataset} shares nothing with the calibration text"
    shell:
        'python "$SCRIPTS/prepare_data.py" --config {params.config:q} --dataset {wildcards.dataset:q} '
        "--check-overlap --raw {params.raw:q} --out {output:q} 2> {log:q}"
