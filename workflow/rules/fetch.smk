# Everything that needs the network, as local rules; and the config as one file.


rule write_config:
    output:
        f"{RESULTS}/config.yaml",
    params:
        settings=sections(study, *type(study).model_fields),
    localrule: True
    message:
        "Writing the complete config"
    run:
        write_config(study, output[0])


rule fetch_model:
    input:
        config=ancient(f"{RESULTS}/config.yaml"),
    output:
        f"{RESULTS}/model.json",
    params:
        settings=sections(study, "model"),
        results=RESULTS,
    log:
        f"{RESULTS}/logs/fetch_model.log",
    localrule: True
    retries: 2
    conda:
        "../../envs/model.yaml"
    message:
        "Fetching and checking the model"
    shell:
        "HF_HUB_OFFLINE=0 python scripts/fetch_model.py --results {params.results} 2> {log}"


rule fetch_data:
    input:
        config=ancient(f"{RESULTS}/config.yaml"),
    output:
        f"{RESULTS}/data/raw/{{file}}",
    params:
        settings=lambda wildcards: source_section(study, wildcards.file),
        name=lambda wildcards: dataset_of(wildcards.file),
    log:
        f"{RESULTS}/logs/fetch_data/{{file}}.log",
    localrule: True
    retries: 2
    conda:
        "../../envs/model.yaml"
    message:
        "Fetching {wildcards.file}"
    shell:
        "HF_HUB_OFFLINE=0 python scripts/fetch_data.py --config {input.config} "
        "--dataset {params.name} --out {output} 2> {log}"
