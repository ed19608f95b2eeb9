"""Reference posteriors: thirteen models, each in two forms, against draws checked by others."""
