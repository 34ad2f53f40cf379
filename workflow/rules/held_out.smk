# Interventions on text that nothing was fitted on; validity and ablation read their files.
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.workflow import held_out_documents, held_out_inputs

held_out = HeldOutFiles(Path(RESULTS))


rule toggle_held_out:
    input:
        model=f"{RESULTS}/model.json",
        files=lambda wildcards: held_out_inputs(study, wildcards.text, RESULTS),
    output:
        held_out.of_text("{text}"),
    log:
        f"{RESULTS}/logs/toggle_held_out/{{text}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/toggle_held_out/{{text}}.tsv"
    priority: 1  # as the analyses that read it
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "analysis.held_out.tokens",
            "analysis.held_out.dataset_tokens",
            "calibration.nulls",
            "evaluation.window",
            "seed",
        ),
        arm=study.bh_arm(1).id,
        results=subpath(input.model, parent=True),
    message:
        "Toggling and removing experts of held-out tokens: {wildcards.text}"
    shell:
        'python "$SCRIPTS/held_out.py" --results {params.results:q} --text {wildcards.text:q} '
        "2> {log:q}"


rule toggle_routed:
    input:
        model=f"{RESULTS}/model.json",
        files=held_out_inputs(study, "calibration", RESULTS),
    output:
        str(held_out.routed),
    log:
        f"{RESULTS}/logs/toggle_routed.log",
    benchmark:
        f"{RESULTS}/benchmarks/toggle_routed.tsv"
    priority: 1  # as the analyses that read it
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study, "model", "analysis.held_out.dataset_tokens", "evaluation.window", "seed"
        ),
        arm=study.bh_arm(1).id,
        results=subpath(input.model, parent=True),
    message:
        "Removing experts of held-out tokens in the states of BH routing"
    shell:
        'python "$SCRIPTS/held_out.py" --results {params.results:q} --routed 2> {log:q}'


rule toggle_dead:
    input:
        model=f"{RESULTS}/model.json",
        documents=held_out_documents("calibration", RESULTS),
        outputs=f"{RESULTS}/calibration/expert_outputs.safetensors",
    output:
        held_out.of_dead(),
    log:
        f"{RESULTS}/logs/toggle_dead.log",
    benchmark:
        f"{RESULTS}/benchmarks/toggle_dead.tsv"
    priority: 1  # as the analyses that read it
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime),
        gpu=study.resources.gpu,
    params:
        settings=sections(
            study,
            "model",
            "analysis.held_out.dead_experts",
            "analysis.held_out.dead_tokens",
            "evaluation.window",
            "seed",
        ),
        results=subpath(input.model, parent=True),
    message:
        "Toggling experts of a model with dead experts"
    shell:
        'python "$SCRIPTS/held_out.py" --results {params.results:q} --dead 2> {log:q}'
