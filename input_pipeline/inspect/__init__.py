"""What the model will see, as a page for a person: `python -m input_pipeline.inspect`.

rows of the pipeline (look.py) -> facts, volumes and texts as the arrays hold them (facts.py) -> index.html, rows.json
(page.py, style.css)
"""
