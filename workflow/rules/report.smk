# What people read: the one-page report, and the article with its notebooks.
from moe_routing.analysis.outputs import ANALYSES, CONSEQUENCE
from moe_routing.reporting.pages import outputs, pdf_sources, renderer, sources


rule comparison_report:
    input:
        model=f"{RESULTS}/model.json",
        cells=rules.collect.output,
        statistics=rules.statistics.output,
        law=CONSEQUENCE.file_paths(RESULTS),
        figures=rules.plot_comparison.output,
    output:
        report(
            f"{RESULTS}/comparison/ROUTING_COMPARISON_REPORT.md",
            caption="../report/comparison_report.rst",
            category="Texts",
            labels={"text": "comparison on one page"},
        ),
    log:
        f"{RESULTS}/logs/comparison_report.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        results=subpath(input.model, parent=True),
    message:
        "Writing the comparison report"
    shell:
        'python "$SCRIPTS/comparison_report.py" --results {params.results:q} 2> {log:q}'


rule render_article:
    input:
        pages=[f"{CHECKOUT / 'report' / page}" for page in sources()],
        report=rules.comparison_report.output[0],
        replications=f"{RESULTS}/replications.csv",
        analyses=[analysis.plot_paths(RESULTS, "png") for analysis in ANALYSES],
    output:
        # Updated, not removed before the job: if rendering fails, the last good article stays.
        report(
            update(f"{RESULTS}/report/index.html"),
            caption="../report/article.rst",
            category="Texts",
            labels={"text": "article"},
        ),
        [update(f"{RESULTS}/report/{name}") for name in outputs() if name != "index.html"],
    log:
        f"{RESULTS}/logs/render_article.log",
    conda:
        REPORT_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        results=subpath(input.report, ancestor=2),
        source=CHECKOUT / "report",
        # Another renderer makes the article again.
        renderer=lambda wildcards: renderer(),
    message:
        "Rendering the article"
    # Shown as well as logged: it warns where a preview stands in for Quarto's pages.
    shell:
        'python "$SCRIPTS/render_report.py" --results {params.results:q} '
        "--source {params.source:q} 2>&1 | tee {log:q}"


# On request: snakemake --cores all article_pdf. Typst comes with Quarto; without it: pip install typst.
rule article_pdf:
    input:
        pages=[f"{CHECKOUT / 'report' / page}" for page in pdf_sources()],
        article=rules.render_article.output,
    output:
        update(f"{RESULTS}/report/index.pdf"),
    log:
        f"{RESULTS}/logs/article_pdf.log",
    conda:
        REPORT_ENVIRONMENT
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        results=subpath(output[0], ancestor=2),
        source=CHECKOUT / "report",
        renderer=lambda wildcards: renderer(),
    message:
        "Rendering the article as a PDF"
    shell:
        'python "$SCRIPTS/render_report.py" --pdf --results {params.results:q} '
        "--source {params.source:q} > {log:q} 2>&1"


# What a machine without the model, the data or torch needs to make statistics, figures and the
# article again: unpacked into another working directory, the same command does.
rule archive:
    input:
        model=f"{RESULTS}/model.json",
        statistics=rules.statistics.output,
        report=rules.comparison_report.output[0],
        article=rules.render_article.output,
    output:
        f"{RESULTS}.tar.gz",
    log:
        f"{RESULTS}/logs/archive.log",
    conda:
        "../../envs/analysis.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        results=subpath(input.model, parent=True),
    message:
        "Packing the finished study: {output}"
    shell:
        'python "$SCRIPTS/archive.py" --results {params.results:q} --out {output:q} 2> {log:q}'
