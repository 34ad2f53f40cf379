# What becomes of the trained weights: a folder for transformers, and its model card.


rule pretrain_export:
    input:
        tokenizer=TOKENIZER,
        weights=f"{RUN}/weights.safetensors",
    output:
        weights=f"{RUN}/model/model.safetensors",
        architecture=f"{RUN}/model/config.json",
        generation=f"{RUN}/model/generation_config.json",
        tokenizer=[f"{RUN}/model/tokenizer.json", f"{RUN}/model/tokenizer_config.json"],
    log:
        f"{RUN}/logs/export.log",
    conda:
        MODEL_ENVIRONMENT
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * 2 ** (attempt - 1),
        runtime=15,
    params:
        config=CONFIG,
        settings=sections(pretraining, "model", "max_weights_bytes"),
        folder=subpath(output.weights, parent=True),
    message:
        "Exporting the model"
    shell:
        'python "$SCRIPTS/pretrain.py" export --config {params.config:q} '
        "--tokenizer {input.tokenizer:q} --weights {input.weights:q} "
        "--out {params.folder:q} 2> {log:q}"


rule pretrain_measure:
    input:
        model=f"{RUN}/model/model.safetensors",
        beside=rules.pretrain_export.output,
        tokens=expand(f"{TOKENS}/{{source}}.validation.npy", source=TEXT),
    output:
        f"{RUN}/card.json",
    log:
        f"{RUN}/logs/measure.log",
    benchmark:
        f"{RUN}/benchmarks/measure.tsv"
    conda:
        MODEL_ENVIRONMENT
    threads: pretraining.threads or workflow.cores
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * 2 ** (attempt - 1),
        runtime=60,
        gpu=int(pretraining.device.startswith("cuda")),
    params:
        config=CONFIG,
        settings=sections(pretraining, "card_tokens", "sequence_length", "seed", "threads"),
        model=subpath(input.model, parent=True),
        tokens=lambda wildcards, input: os.path.dirname(input.tokens[0]),
    message:
        "Measuring the model for its card; progress: tail -f {log}"
    shell:
        'python "$SCRIPTS/pretrain.py" measure --config {params.config:q} --model {params.model:q} '
        "--tokens {params.tokens:q} --out {output:q} 2> {log:q}"


rule pretrain_card:
    input:
        measured=f"{RUN}/card.json",
        log=f"{RUN}/training.csv",
        counts=expand(f"{TOKENS}/{{source}}.json", source=TEXT),
    output:
        card=f"{RUN}/model/README.md",
        figure=report(f"{RUN}/model/training.png", category="Pretraining"),
    log:
        f"{RUN}/logs/card.log",
    conda:
        "../../envs/analysis.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * 2 ** (attempt - 1),
        runtime=15,
    params:
        config=CONFIG,
        settings=sections(pretraining, *type(pretraining).model_fields),
        tokens=lambda wildcards, input: os.path.dirname(input.counts[0]),
        folder=subpath(output.card, parent=True),
    message:
        "Writing the model card"
    shell:
        'python "$SCRIPTS/pretrain.py" card --config {params.config:q} --measured {input.measured:q} '
        "--tokens {params.tokens:q} --log {input.log:q} --out {params.folder:q} 2> {log:q}"
