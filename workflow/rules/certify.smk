# What strategies need that is fitted by running them: certificates, and scales of the output.
from moe_routing.workflow import calibration_files


rule certify:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/certification.parquet",
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        calibration=lambda wildcards: calibration_files(
            study, [wildcards.strategy], RESULTS, fitted_by_running=False
        ),
    output:
        f"{RESULTS}/calibration/certificates/{{strategy}}.json",
    log:
        f"{RESULTS}/logs/certify/{{strategy}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/certify/{{strategy}}.tsv"
    # The cells of all levers wait for it.
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "evaluation.window", "evaluation.token_budget"),
        results=subpath(input.model, parent=True),
    message:
        "Certifying {wildcards.strategy} on {study.calibration.documents} documents"
    shell:
        "python scripts/certify.py --results {params.results:q} --strategy {wildcards.strategy:q} "
        "> {log:q} 2>&1"


rule fit_scales:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/calibration.parquet",
        sample=f"{RESULTS}/calibration/router_logits.safetensors",
        calibration=calibration_files(study, study.scaled, RESULTS, fitted_by_running=False),
    output:
        f"{RESULTS}/calibration/scales.json",
    log:
        f"{RESULTS}/logs/fit_scales.log",
    benchmark:
        f"{RESULTS}/benchmarks/fit_scales.tsv"
    priority: 1
    conda:
        "../../envs/model.yaml"
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=study.resources.runtime,
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "evaluation.window", "evaluation.token_budget"),
        strategies=study.scaled,
        results=subpath(input.model, parent=True),
    message:
        "Fitting the scale of the output under {params.strategies}"
    shell:
        "python scripts/fit_scales.py --results {params.results:q} > {log:q} 2>&1"
