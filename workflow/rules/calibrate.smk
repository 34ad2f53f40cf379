# Router logits of calibration text, and the nulls fitted on them.


rule sample_logits:
    input:
        config=ancient(f"{RESULTS}/config.yaml"),
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/calibration.parquet",
    output:
        f"{RESULTS}/calibration/router_logits.safetensors",
    params:
        settings=sections(study, "model", "calibration", "seed"),
        results=RESULTS,
    log:
        f"{RESULTS}/logs/sample_logits.log",
    benchmark:
        f"{RESULTS}/benchmarks/sample_logits.tsv"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    conda:
        "../../envs/model.yaml"
    message:
        "Sampling router logits on calibration text"
    shell:
        "python scripts/sample_logits.py --results {params.results} 2> {log}"


rule fit_null:
    input:
        f"{RESULTS}/calibration/router_logits.safetensors",
    output:
        null=f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
        diagnostics=f"{RESULTS}/calibration/nulls/{{null}}.csv",
    log:
        f"{RESULTS}/logs/fit_null/{{null}}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    conda:
        "../../envs/model.yaml"
    message:
        "Fitting null {wildcards.null}"
    shell:
        "python scripts/fit_null.py --sample {input} --null {wildcards.null} "
        "--out {output.null} --diagnostics {output.diagnostics} 2> {log}"
