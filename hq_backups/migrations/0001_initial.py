from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Artifact",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("run", models.CharField(blank=True, max_length=255)),
                ("store", models.CharField(max_length=32)),
                ("mode", models.CharField(blank=True, max_length=32)),
                ("type", models.CharField(blank=True, max_length=32)),
                ("env", models.CharField(blank=True, max_length=128)),
                ("host", models.CharField(blank=True, max_length=255)),
                ("taken_at", models.DateTimeField(db_index=True)),
                ("name", models.CharField(max_length=1024)),
                ("size", models.BigIntegerField(blank=True, null=True)),
                ("sha256", models.CharField(blank=True, max_length=64)),
                ("managed", models.BooleanField(default=True)),
                ("problem", models.TextField(blank=True)),
                ("verified_at", models.DateTimeField(blank=True, null=True)),
                ("gone_at", models.DateTimeField(blank=True, null=True)),
                ("manifest", models.JSONField(blank=True, default=dict)),
                ("locations", models.JSONField(blank=True, default=list)),
            ],
            options={
                "ordering": ("-taken_at", "-pk"),
                "indexes": [
                    models.Index(fields=["store", "type", "-taken_at"], name="hqb_artifact_store_type")
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("store", "name", "run", "env", "host", "taken_at"), name="hqb_artifact_once"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="BackupRun",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("run", models.CharField(max_length=255, unique=True)),
                ("verb", models.CharField(max_length=32)),
                ("store", models.CharField(max_length=32)),
                ("mode", models.CharField(blank=True, max_length=32)),
                ("type", models.CharField(blank=True, max_length=32)),
                ("env", models.CharField(blank=True, max_length=128)),
                ("host", models.CharField(blank=True, max_length=255)),
                ("started_at", models.DateTimeField(db_index=True)),
                ("finished_at", models.DateTimeField(blank=True, null=True)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("running", "Running"),
                            ("ok", "Ok"),
                            ("warning", "Warning"),
                            ("failed", "Failed"),
                        ],
                        default="running",
                        max_length=16,
                    ),
                ),
                ("exit_code", models.SmallIntegerField(blank=True, null=True)),
                ("error", models.TextField(blank=True)),
                ("hint", models.TextField(blank=True)),
                ("warnings", models.JSONField(blank=True, default=list)),
                ("artifact", models.CharField(blank=True, max_length=1024)),
                ("size", models.BigIntegerField(blank=True, null=True)),
                ("seconds", models.FloatField(blank=True, null=True)),
                ("facts", models.JSONField(blank=True, default=dict)),
            ],
            options={
                "ordering": ("-started_at", "-pk"),
                "indexes": [models.Index(fields=["store", "verb", "-started_at"], name="hqb_run_store_verb")],
            },
        ),
    ]
