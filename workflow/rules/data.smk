# Items of the evaluation sets, and calibration text that shares nothing with them.


rule prepare_dataset:
    input:
        raw=lambda wildcards: raw_file(study, RESULTS, wildcards.dataset),
    output:
        f"{RESULTS}/data/{{dataset}}.parquet",
    log:
        f"{RESULTS}/logs/prepare_dataset/{{dataset}}.log",
    conda:
        "../../envs/model.yaml"
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
        "python scripts/prepare_data.py --config {params.config:q} --dataset {wildcards.dataset:q} "
        "--raw {params.raw:q} --out {output:q} 2> {log:q}"


rule prepare_calibration:
    input:
        raw=raw_file(study, RESULTS, "calibration"),
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
    output:
        texts=f"{RESULTS}/data/calibration.parquet",
        certification=f"{RESULTS}/data/certification.parquet",
        manifest=f"{RESULTS}/data/calibration.json",
    log:
        f"{RESULTS}/logs/prepare_calibration.log",
    conda:
        "../../envs/model.yaml"
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
        "python scripts/prepare_data.py --config {params.config:q} --dataset calibration "
        "--raw {params.raw:q} --out {output.texts:q} 2> {log:q}"
