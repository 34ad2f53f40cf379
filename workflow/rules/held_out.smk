# Interventions on text that nothing was fitted on; validity and ablation read their files.
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.workflow import held_out_documents, held_out_inputs

held_out = HeldOutFiles(Path(RESULTS))


# All texts in one job: starting Python and loading the model takes longer than a small text.
rule toggle_held_out:
    input:
        model=f"{RESULTS}/model.json",
        files=held_out_inputs(study, RESULTS),
    output:
        held_out.of_stock(study),
    log:
        f"{RESULTS}/logs/toggle_held_out.log",
    benchmark:
        f"{RESULTS}/benchmarks/toggle_held_out.tsv"
    priority: 1  # as the analyses that read it
    conda:
        MODEL_ENVIRONMENT
    threads: study.resources.threads
    resources:
        mem_mb=doubled(study.resources.mem_mb),
        runtime=doubled(study.resources.runtime * (1 + len(study.held_out_texts))),
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
        "Toggling and removing experts of held-out tokens"
    shell:
        'python "$SCRIPTS/held_out.py" --results {params.results:q} 2> {log:q}'


rule toggle_dead:
    input:
        model=f"{RESULTS}/model.json",
        documents=held_out_documents(["calibration"], RESULTS),
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
