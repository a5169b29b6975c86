//! The template that people start from renders without a problem, and to what its README promises.

use skerry_reconciler::render_dir;
use std::path::Path;

fn template() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fleet-repo-template")
}

#[test]
fn the_template_renders_its_apps_for_their_sites_without_a_problem() {
    let rendered = render_dir(&template()).unwrap();
    assert_eq!(rendered.all_problems(), []);
    assert!(rendered.roster.is_some());
    let releases: Vec<_> = rendered.releases.keys().map(ToString::to_string).collect();
    assert_eq!(
        releases,
        [
            "lisbon-01/devices",
            "lisbon-01/fridge-watch",
            "lisbon-01/hello-web",
            "lisbon-01/tick",
            "porto-01/hello-web",
            "porto-01/tick"
        ]
    );

    let yaml = rendered.to_yaml();
    assert!(yaml.contains("<h1>Bom dia from lisbon-01</h1>"), "{yaml}");
    assert!(yaml.contains("<title>porto-01 of Example Coastguard</title>"), "{yaml}");
    assert!(yaml.contains("replicas: 1\n"), "{yaml}");
}

#[test]
fn every_folder_that_the_readme_names_is_read() {
    let readme = std::fs::read_to_string(template().join("README.md")).unwrap();
    for variable in ["${site.name}", "${site.vars.NAME}", "${app.vars.NAME}", "${fleet.vars.NAME}"]
    {
        assert!(readme.contains(variable), "{variable}");
    }
    for path in [
        "fleet.yaml",
        "sites/lisbon-01.yaml",
        "apps/hello-web/app.yaml",
        "devices/models/fridge.yaml",
    ] {
        assert!(template().join(path).is_file(), "{path}");
    }
}

#[test]
fn the_fridge_and_its_door_render_for_their_site() {
    let rendered = render_dir(&template()).unwrap();
    let devices = rendered.releases.iter().find(|(key, _)| key.to_string() == "lisbon-01/devices");
    let (_, outcome) = devices.unwrap();
    let objects = outcome.as_ref().unwrap().objects();
    let names: Vec<_> = objects.keys().map(ToString::to_string).collect();
    assert_eq!(
        names,
        [
            "DeviceModel door-contact",
            "DeviceModel fridge",
            "Device fridge",
            "Device fridge-door",
            "DeviceRule too-warm"
        ]
    );
    let values: Vec<_> = objects.values().map(|object| &object.value).collect();
    assert!(values[2..4].iter().all(|device| device["spec"]["nodeName"] == "lisbon-01-a"));
}
