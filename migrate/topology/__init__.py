"""GPU topology: model, matching rules, search and explanation."""
