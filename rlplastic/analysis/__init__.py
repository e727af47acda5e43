"""What runs say together: reading run directories, statistics over seeds and tasks, figures, and the report's page."""
