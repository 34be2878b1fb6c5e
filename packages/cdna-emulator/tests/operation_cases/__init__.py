"""Random but legal instructions and register states, for tests that compare two cores."""
