"""One training: prepare it, run `fit`, hand each event to the loggers, save."""
