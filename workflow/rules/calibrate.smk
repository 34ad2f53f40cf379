# Router logits, expert outputs and toggled experts of calibration text, and the nulls fitted on them.
from moe_routing.evaluation.pieces import null_piece
from moe_routing.workflow import intervention_files


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
    # Every null and every budget waits for it.
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study, "model", "calibration.source", "calibration.tokens", "evaluation.window", "seed"
        ),
        results=subpath(input.model, parent=True),
    message:
        "Sampling router logits on calibration text"
    shell:
        'python "$SCRIPTS/sample_logits.py" --results {params.results:q} 2> {log:q}'


rule fit_outputs:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/calibration.parquet",
    output:
        f"{RESULTS}/calibration/expert_outputs.safetensors",
    log:
        f"{RESULTS}/logs/fit_outputs.log",
    benchmark:
        f"{RESULTS}/benchmarks/fit_outputs.tsv"
    # Toggling waits for it, and every BH cell for that.
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study, "model", "calibration.source", "calibration.tokens", "evaluation.window"
        ),
        results=subpath(input.model, parent=True),
    message:
        "Measuring the outputs of all experts on calibration text"
    shell:
        'python "$SCRIPTS/fit_outputs.py" --results {params.results:q} 2> {log:q}'


rule toggle_experts:
    input:
        model=f"{RESULTS}/model.json",
        texts=f"{RESULTS}/data/calibration.parquet",
        outputs=f"{RESULTS}/calibration/expert_outputs.safetensors",
    output:
        f"{RESULTS}/calibration/toggles.safetensors",
    log:
        f"{RESULTS}/logs/toggle_experts.log",
    benchmark:
        f"{RESULTS}/benchmarks/toggle_experts.tsv"
    # Every BH cell waits for it.
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(study, "model", "calibration.toggled_tokens", "evaluation.window", "seed"),
        results=subpath(input.model, parent=True),
    message:
        f"Toggling experts of {study.calibration.toggled_tokens} calibration tokens"
    shell:
        'python "$SCRIPTS/toggle_experts.py" --results {params.results:q} 2> {log:q}'


rule fit_null:
    input:
        f"{RESULTS}/calibration/router_logits.safetensors",
        lambda wildcards: intervention_files([wildcards.null], RESULTS),
    output:
        null=f"{RESULTS}/calibration/nulls/{{null}}.safetensors",
        diagnostics=f"{RESULTS}/calibration/nulls/{{null}}.csv",
    log:
        f"{RESULTS}/logs/fit_null/{{null}}.log",
    # Short, and the longest jobs wait for all of them.
    priority: 4
    conda:
        MODEL_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=lambda wildcards: null_piece(study, wildcards.null).settings,
        results=subpath(output.null, ancestor=3),
    message:
        "Fitting null {wildcards.null}"
    shell:
        'python "$SCRIPTS/fit_null.py" --results {params.results:q} --null {wildcards.null:q} '
        "--settings {params.settings:q} --inputs {input:q} 2> {log:q}"
