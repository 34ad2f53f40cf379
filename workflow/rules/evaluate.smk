# The GPU jobs: one strategy or control a job, so that loading the model serves every evaluation
# set; and one job for the baseline under every noise arm.


rule evaluate:
    input:
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=lambda wildcards: expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=nulls_of(wildcards.strategy, study.statistics.baseline),
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
            study,
            "model",
            "evaluation",
            "seed",
            "statistics.baseline",
            "statistics.confidence",
            "statistics.resamples",
        ),
        datasets=", ".join(study.datasets),
        results=subpath(input.model, parent=True),
    message:
        "Scoring {wildcards.strategy} on {params.datasets} ({threads} threads, gpu={resources.gpu})"
    shell:
        "python scripts/evaluate.py --results {params.results} --strategy {wildcards.strategy} "
        "2> {log}"


rule noise:
    input:
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        nulls=expand(
            f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
            null=nulls_of(study.statistics.baseline),
        ),
    output:
        tables=expand(
            f"{RESULTS}/noise/{{arm}}/{{dataset}}.parquet",
            arm=[arm.name for arm in study.noise],
            dataset=study.datasets,
        ),
        cells=expand(
            f"{RESULTS}/noise/{{arm}}/{{dataset}}.json",
            arm=[arm.name for arm in study.noise],
            dataset=study.datasets,
        ),
    log:
        f"{RESULTS}/logs/noise.log",
    benchmark:
        f"{RESULTS}/benchmarks/noise.tsv"
    # The longest job, so that it starts with the first.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=lambda wildcards, attempt: study.resources.mem_mb * 2 ** (attempt - 1),
        runtime=study.resources.runtime * max(1, len(study.noise)),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "evaluation.token_budget",
            "evaluation.window",
            "noise",
            "seed",
            "statistics.baseline",
            "statistics.confidence",
            "statistics.resamples",
        ),
        arms=", ".join(arm.name for arm in study.noise),
        results=subpath(input.model, parent=True),
    message:
        "Scoring the baseline under {params.arms} ({threads} threads, gpu={resources.gpu})"
    shell:
        "python scripts/noise.py --results {params.results} 2> {log}"
