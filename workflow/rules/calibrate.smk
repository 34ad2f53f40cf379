# Router logits of calibration text, and the nulls fitted on them.


rule sample_logits:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/calibration.parquet",
    output:
        f"{RESULTS}/calibration/router_logits.safetensors",
    log:
        f"{RESULTS}/logs/sample_logits.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_logits.tsv"
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "calibration", "seed"),
        results=subpath(input.model, parent=True),
    message:
        "Sampling router logits on calibration text"
    shell:
        "python scripts/sample_logits.py --results {params.results:q} 2> {log:q}"


rule fit_null:
    input:
        f"{RESULTS}/calibration/router_logits.safetensors",
    output:
        null=f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
        diagnostics=f"{RESULTS}/calibration/nulls/{{null}}.csv",
    log:
        f"{RESULTS}/logs/fit_null/{{null}}.log",
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    message:
        "Fitting null {wildcards.null}"
    shell:
        "python scripts/fit_null.py --sample {input:q} --null {wildcards.null:q} "
        "--out {output.null:q} --diagnostics {output.diagnostics:q} 2> {log:q}"
