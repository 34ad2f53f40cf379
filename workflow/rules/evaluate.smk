# The GPU jobs. One scores a few strategies of a family, or a few controls, on every evaluation set,
# so that starting Python and loading the model serves them all; and one scores the baseline under
# every numerics arm. A rule has the same number of outputs for any wildcard, hence one rule per job.
from moe_routing.workflow import calibration_files

for strategies in study.scoring_jobs:

    rule:
        name:
            f"evaluate_{strategies[0]}".replace(".", "_")
        input:
            model=f"{RESULTS}/model.json",
            data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
            sample=f"{RESULTS}/calibration/router_logits.safetensors",
            calibration=calibration_files(
                study, [*study.group_of(strategies), study.statistics.baseline], RESULTS
            ),
            # One of the strategies may be the baseline under another id, and is not scored again.
            baseline=expand(
                f"{RESULTS}/cells/{study.statistics.baseline}/{{dataset}}.{{kind}}",
                dataset=study.datasets if study.needs_baseline(strategies) else [],
                kind=["parquet", "json"],
            ),
        output:
            expand(
                f"{RESULTS}/cells/{{strategy}}/{{dataset}}.{{kind}}",
                strategy=strategies,
                dataset=study.datasets,
                kind=["parquet", "json"],
            ),
        log:
            f"{RESULTS}/logs/evaluate/{strategies[0]}.log",
        benchmark:
            f"{RESULTS}/benchmarks/evaluate/{strategies[0]}.tsv"
        # Controls with many experts, and levers, are the longest jobs, so that they start with the first.
        priority: int(strategies[0] not in study.strategies)
        conda:
            "../../envs/model.yaml"
        threads: study.resources.threads
        resources:
            mem_mb=doubled(study.resources.mem_mb),
            runtime=study.resources.runtime * len(strategies),
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
            # From the outputs: another grouping into jobs is then no reason to score again.
            strategies=lambda wildcards, output: unique_folders(output),
            datasets=", ".join(study.datasets),
            results=subpath(input.model, parent=True),
        message:
            "Scoring {params.strategies} on {params.datasets} ({threads} threads, "
            "gpu={resources.gpu})"
        shell:
            "python scripts/evaluate.py --results {params.results:q} "
            "--strategy {params.strategies:q} 2> {log:q}"


rule numerics:
    input:
        model=f"{RESULTS}/model.json",
        data=expand(f"{RESULTS}/data/{{dataset}}.parquet", dataset=study.datasets),
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        calibration=calibration_files(study, [study.statistics.baseline], RESULTS),
    output:
        tables=expand(
            f"{RESULTS}/numerics/{{arm}}/{{dataset}}.parquet",
            arm=[arm.name for arm in study.numerics],
            dataset=study.datasets,
        ),
        cells=expand(
            f"{RESULTS}/numerics/{{arm}}/{{dataset}}.json",
            arm=[arm.name for arm in study.numerics],
            dataset=study.datasets,
        ),
    log:
        f"{RESULTS}/logs/numerics.log",
    benchmark:
        f"{RESULTS}/benchmarks/numerics.tsv"
    # The longest job, so that it starts with the first.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=study.resources.runtime * max(1, len(study.numerics)),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "evaluation.token_budget",
            "evaluation.window",
            "numerics",
            "seed",
            "statistics.baseline",
            "statistics.confidence",
            "statistics.resamples",
        ),
        arms=", ".join(arm.name for arm in study.numerics),
        results=subpath(input.model, parent=True),
    message:
        "Scoring the baseline under {params.arms} ({threads} threads, gpu={resources.gpu})"
    shell:
        "python scripts/numerics.py --results {params.results:q} 2> {log:q}"
