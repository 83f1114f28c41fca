"""What is read from circuits: pages, figures and reports."""
