"""`python -m input_pipeline.inspect`: a page that shows the rows of the pipeline as the model sees them.

    rows of the pipeline (sampling.py) -> views of their arrays (views.py, images.py, tokens.py)
      -> index.html, rows.json (page.py, style.css)

It reads the arrays of rows, and the notices about their scans from the index. Checks of the files belong to `index`.
"""
