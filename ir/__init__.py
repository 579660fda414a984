"""Graph IR: types, operators, importer, passes and automatic differentiation."""
