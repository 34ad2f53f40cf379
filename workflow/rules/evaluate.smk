# The GPU jobs: one strategy a job, so that loading the model serves every evaluation set.


rule evaluate:
    input:
        config=ancient(f"{RESULTS}/config.yaml"),
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=lambda wildcards: expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=nulls_of(wildcards.strategy),
        ),
    output:
        items=expand(
            f"{RESULTS}/cells/{{{{strategy}}}}/{{dataset}}.parquet", dataset=study.datasets
        ),
        cells=expand(
            f"{RESULTS}/cells/{{{{strategy}}}}/{{dataset}}.json", dataset=study.datasets
        ),
    params:
        settings=sections(study, "model", "evaluation", "seed", "statistics"),
        results=RESULTS,
    log:
        f"{RESULTS}/logs/evaluate/{{strategy}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{strategy}}.tsv"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    conda:
        "../../envs/model.yaml"
    message:
        "Scoring {wildcards.strategy} on {study.datasets}"
    shell:
        "python scripts/evaluate.py --results {params.results} --strategy {wildcards.strategy} "
        "2> {log}"
