# Everything that needs the network, as local rules: they use it unless the user forbids that.


rule fetch_model:
    input:
        model_files(study),
    output:
        f"{RESULTS}/model.json",
    log:
        f"{RESULTS}/logs/fetch_model.log",
    retries: 2 * bool(study.model.revision)  # A local model needs no network: what fails is wrong.
    localrule: True
    conda:
        MODEL_ENVIRONMENT
    params:
        settings=sections(study, "model"),
        results=subpath(output[0], parent=True),
    message:
        "Fetching and checking the model"
    shell:
        'HF_HUB_OFFLINE=$USER_OFFLINE python "$SCRIPTS/fetch_model.py" --results {params.results:q} 2> {log:q}'


# The first job checks the model, and the study against it: nothing else is worth doing before.
rule fetch_data:
    input:
        ancient(rules.fetch_model.output),
    output:
        f"{RESULTS}/data/raw/{{file}}",
    log:
        f"{RESULTS}/logs/fetch_data/{{file}}.log",
    retries: 2
    localrule: True
    conda:
        MODEL_ENVIRONMENT
    params:
        settings=lambda wildcards: source_section(study, wildcards.file),
        name=lambda wildcards: dataset_of(wildcards.file),
        config=CONFIG,
    message:
        "Fetching {wildcards.file}"
    shell:
        'HF_HUB_OFFLINE=$USER_OFFLINE python "$SCRIPTS/fetch_data.py" --config {params.config:q} '
        "--dataset {params.name:q} --out {output:q} 2> {log:q}"
