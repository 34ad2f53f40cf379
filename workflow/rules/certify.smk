# What strategies need that is fitted by running them: certificates, the free parameters of those with
# a budget of experts per token, and then scales of the output.
from moe_routing.config.cells import budget_files, calibration_files, scale_files
from moe_routing.evaluation.pieces import budget_piece, scale_piece
from moe_routing.workflow import in_results


rule certify:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/certification.parquet",
        calibration=lambda wildcards: in_results(
            RESULTS, calibration_files(study, [wildcards.strategy], fitted_by_running=False)
        ),
    output:
        f"{RESULTS}/calibration/certificates/{{strategy}}.json",
    log:
        f"{RESULTS}/logs/certify/{{strategy}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/certify/{{strategy}}.tsv"
    # The cells of all levers wait for it.
    priority: 2
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "evaluation.window", "evaluation.token_budget"),
        results=subpath(input.model, parent=True),
    message:
        f"Certifying {{wildcards.strategy}} on {study.calibration.documents} documents"
    shell:
        'python "$SCRIPTS/certify.py" --results {params.results:q} --strategy {wildcards.strategy:q} '
        "> {log:q} 2>&1"


rule fit_budget:
    input:
        lambda wildcards: in_results(RESULTS, budget_files(study, wildcards.budgeted)),
    output:
        f"{RESULTS}/calibration/budgets/{{budgeted}}.json",
    log:
        f"{RESULTS}/logs/fit_budget/{{budgeted}}.log",
    # Scales, and the cells at equal budgets, wait for it.
    priority: 3
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime * study.resources.strategies_per_job),
        gpu=study.resources.gpu,
    params:
        settings=lambda wildcards: budget_piece(study, wildcards.budgeted).settings,
        results=subpath(output[0], ancestor=3),
    message:
        "Fitting the budget of {wildcards.budgeted}"
    shell:
        'python "$SCRIPTS/fit_budgets.py" --results {params.results:q} '
        "--strategy {wildcards.budgeted:q} --settings {params.settings:q} --inputs {input:q} "
        "2> {log:q}"


rule fit_scale:
    input:
        lambda wildcards: in_results(RESULTS, scale_files(study, wildcards.strategy)),
    output:
        f"{RESULTS}/calibration/scales/{{strategy}}.json",
    log:
        f"{RESULTS}/logs/fit_scale/{{strategy}}.log",
    # After the budgets, so that one job fits the scales of strategies with and without one.
    priority: 2
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime * study.resources.strategies_per_job),
        gpu=study.resources.gpu,
    params:
        settings=lambda wildcards: scale_piece(study, wildcards.strategy).settings,
        results=subpath(output[0], ancestor=3),
    message:
        "Fitting the scale of the output under {wildcards.strategy}"
    shell:
        'python "$SCRIPTS/fit_scales.py" --results {params.results:q} '
        "--strategy {wildcards.strategy:q} --settings {params.settings:q} --inputs {input:q} "
        "2> {log:q}"
