# The analyses beside the cells, and the figures of their tables: baseline, BH, validity, ablation.
from moe_routing.analysis.outputs import ANALYSES
from moe_routing.workflow import analysis_inputs

for analysis in ANALYSES:

    rule:
        name:
            analysis.name
        input:
            analysis_inputs(study, analysis, RESULTS),
        output:
            analysis.file_paths(RESULTS),
        log:
            f"{RESULTS}/logs/{analysis.name}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{analysis.name}.tsv"
        conda:
            "../../envs/model.yaml"
        threads: study.resources.threads if analysis.runs_model else 1
        resources:
            mem_mb=doubled(max(study.resources.mem_mb, analysis.mem_mb)),
            runtime=study.resources.runtime,
            gpu=study.resources.gpu * analysis.runs_model,
        params:
            settings=sections(study, *analysis.settings),
            analysis=analysis.name,
            results=subpath(output[0], ancestor=2),
        message:
            analysis.title
        shell:
            "python scripts/analyse.py {params.analysis:q} --results {params.results:q} "
            "> {log:q} 2>&1"

    rule:
        name:
            f"plot_{analysis.name}"
        input:
            analysis.file_paths(RESULTS),
        output:
            png=[
                report(
                    path,
                    caption=f"../report/{analysis.name}.rst",
                    category=analysis.category,
                    labels={"figure": Path(path).stem.replace("_", " ")},
                )
                for path in analysis.plot_paths(RESULTS, "png")
            ],
            svg=analysis.plot_paths(RESULTS, "svg"),
        log:
            f"{RESULTS}/logs/plot_{analysis.name}.log",
        conda:
            "../../envs/analysis.yaml"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=10,
        params:
            analysis=analysis.name,
            results=subpath(input[0], ancestor=2),
        message:
            f"Drawing the figures: {analysis.category}"
        shell:
            "python scripts/analyse.py {params.analysis:q} --results {params.results:q} --figures "
            "> {log:q} 2>&1"
