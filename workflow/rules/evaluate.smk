# The GPU jobs: one strategy a job, so that loading the model serves every evaluation set.


rule evaluate:
    input:
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=lambda wildcards: expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=nulls_of(wildcards.strategy),
        ),
    output:
        tables=expand(
            f"{RESULTS}/cells/{{{{strategy}}}}/{{dataset}}.parquet",
            dataset=study.datasets,
        ),
        cells=expand(
            f"{RESULTS}/cells/{{{{strategy}}}}/{{dataset}}.json",
            dataset=study.datasets,
        ),
    log:
        f"{RESULTS}/logs/evaluate/{{strategy}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{strategy}}.tsv"
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study, "model", "evaluation", "seed", "statistics.confidence", "statistics.resamples"
        ),
        datasets=", ".join(study.datasets),
        results=subpath(input.model, parent=True),
    message:
        "Scoring {wildcards.strategy} on {params.datasets} ({threads} threads, gpu={resources.gpu})"
    shell:
        "python scripts/evaluate.py --results {params.results} --strategy {wildcards.strategy} "
        "2> {log}"
