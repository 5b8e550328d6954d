//! What every rendering has: Secrets, Service, labels and annotations.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Secret, Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sha2::{Digest as _, Sha256};

use super::super::super::LaunchPlan;
use super::{
    JOB_LABEL, LAUNCH_LABEL, MANAGER_LABEL, Manifest, PLAN_ANNOTATION, PORT, ROLE_LABEL, RUN_LABEL, Scene,
    VALUE_ANNOTATION,
};
use crate::topology::Role;

/// The key of the Secret with what all replicas get.
pub(super) const VALUE_KEY: &str = "value";

/// Longest value of a label.
const LABEL_LENGTH: usize = 63;

/// Hexadecimal digits that name a launch: 128 bits, which nobody guesses. All of the hash is too long for a label.
const LAUNCH_DIGITS: usize = 32;

/// What is said of every object of the run; of one role if there is one.
pub(super) fn metadata(scene: &Scene, plan: &LaunchPlan, name: String, role: Option<Role>) -> ObjectMeta {
    ObjectMeta { name: Some(name), labels: Some(labels(scene, plan, role)), ..ObjectMeta::default() }
}

/// A label that only this launch can give: a hash of the caller's identity, which it has made and nobody else has. None in a dry
/// run, which creates nothing.
fn launch(plan: &LaunchPlan) -> Option<(String, String)> {
    let hash = || hash(&plan.caller)[..LAUNCH_DIGITS].to_owned();
    (!plan.caller.is_empty()).then(|| (LAUNCH_LABEL.to_owned(), hash()))
}

/// Fairing's own labels win: the run is found by them.
pub(super) fn labels(scene: &Scene, plan: &LaunchPlan, role: Option<Role>) -> BTreeMap<String, String> {
    let (manager, fairing) = MANAGER_LABEL;
    let mut labels = scene.settings.labels.clone();
    let own = [(RUN_LABEL, plan.run.clone()), (JOB_LABEL, job_label(&scene.provenance.type_name))];
    labels.extend(own.map(|(key, value)| (key.to_owned(), value)));
    labels.insert(manager.to_owned(), fairing.to_owned());
    labels.extend(launch(plan));
    labels.extend(role.map(|role| (ROLE_LABEL.to_owned(), role.to_string())));
    labels
}

/// The pods of one role of a run.
pub(super) fn selector(plan: &LaunchPlan, role: Role) -> BTreeMap<String, String> {
    BTreeMap::from([(RUN_LABEL.to_owned(), plan.run.clone()), (ROLE_LABEL.to_owned(), role.to_string())])
}

/// A type's own name as the value of a label: 63 letters, digits, `-`, `_` and `.`, a letter or digit at each end.
pub(super) fn job_label(type_name: &str) -> String {
    let name = type_name.rsplit("::").next().unwrap_or(type_name);
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.chars().take(LABEL_LENGTH).map(plain).collect();
    let name = name.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    if name.is_empty() { "run".to_owned() } else { name.to_owned() }
}

/// What a run's owner says of it.
pub(super) fn annotations(scene: &Scene, plan: &LaunchPlan) -> BTreeMap<String, String> {
    let provenance = &scene.provenance;
    let known = serde_json::to_string(&scene.known(plan)).expect("a struct has text keys only");
    let always = [
        (VALUE_ANNOTATION, value_hash(&plan.value)),
        ("fairing.dev/image", scene.image.clone()),
        ("fairing.dev/type", provenance.type_name.clone()),
        (PLAN_ANNOTATION, known),
    ];
    let perhaps = [("fairing.dev/commit", &provenance.commit), ("fairing.dev/user", &provenance.user)];
    let perhaps = perhaps.into_iter().filter_map(|(key, value)| Some((key, value.clone()?)));
    always.into_iter().chain(perhaps).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// By which a run that trains the same value is found.
pub(crate) fn value_hash(value: &[u8]) -> String {
    hash(value)
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the replicas get, and in a Secret of its own, since only people may read it, what a caller proves with who it is.
pub(super) fn secrets(scene: &Scene, plan: &LaunchPlan) -> [Manifest; 2] {
    let secret = |name: String, data: BTreeMap<String, ByteString>| {
        // Nothing of a run changes; a node need not ask again and again.
        let metadata = metadata(scene, plan, name, None);
        Manifest::of(&Secret { metadata, data: Some(data), immutable: Some(true), ..Secret::default() })
    };
    let identities = plan.placements.iter().zip(&plan.identities);
    let identities =
        identities.map(|(placement, identity)| (placement.replica.file_name(), ByteString(identity.clone())));
    let value = (VALUE_KEY.to_owned(), ByteString(plan.value.clone()));
    let caller = BTreeMap::from([("identity".to_owned(), ByteString(plan.caller.clone()))]);
    [secret(plan.run.clone(), identities.chain([value]).collect()), secret(format!("{}-caller", plan.run), caller)]
}

/// Gives the pods that host parameters their names.
pub(super) fn service(scene: &Scene, plan: &LaunchPlan) -> Manifest {
    let role = plan.placements[0].topology.coordinator().role;
    let port = ServicePort {
        name: Some("fairing".to_owned()),
        port: PORT.into(),
        target_port: Some(IntOrString::Int(PORT.into())),
        ..ServicePort::default()
    };
    Manifest::of(&Service {
        metadata: metadata(scene, plan, plan.run.clone(), None),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            // Who asks for a server before it listens tries again, but a name that is not there is remembered for a while.
            publish_not_ready_addresses: Some(true),
            selector: Some(selector(plan, role)),
            ports: Some(vec![port]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    })
}
