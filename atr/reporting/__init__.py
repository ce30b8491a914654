"""From the JSON of the stages to the figures, tables and pages of the report; imports no torch."""
