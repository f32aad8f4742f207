"""Training. As a package, so that data workers, which start a fresh Python, do not import it again."""
