-- Prefect and MLflow each keep their migrations in a table of the same name.
create database mlflow;
