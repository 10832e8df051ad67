"""The command line: one module per verb group, loaded only when its verb is used."""
