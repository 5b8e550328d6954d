//! The configuration as it is meant, and the one function that joins the layers into it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::{KEYS, Key};
use super::raw::{Entry, RawConfig};
use super::together::Winners;
use super::{Attribute, ConfigError, Env, Explanation, LaunchOptions, Origin, Problem, Resources, Row, Surroundings};
use crate::topology::{Mode, Topology};

/// What the user wants, checked: past [`Config::resolve`] every value is usable as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How many workers and parameter servers, default one of each.
    pub topology: Topology,
    /// When a worker's gradient is applied, default once all workers have pushed.
    pub mode: Mode,
    /// How long the run is held for a lost worker, which is started again; default zero: it is not.
    pub rejoin: Duration,
    /// Seed of the initial parameters, of the data order and of the framework's generator, default 0.
    pub seed: u64,
    /// Names of the variables that the replicas see, default none. All valid, none fairing's own, none twice.
    pub env: Vec<String>,
    /// The folder behind `worker.data_dir()`, absolute, default none. Whether it exists is not checked.
    pub data_dir: Option<PathBuf>,
    /// Where the replicas run, default on this machine.
    pub target: Target,
    /// The folder that gets a folder for each run, absolute. Default `fairing/runs` in Cargo's build folder.
    pub runs: PathBuf,
    /// What each worker asks for.
    pub worker: Resources,
    /// What each parameter server asks for.
    pub ps: Resources,
}

/// Where the replicas of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// Processes on this machine.
    Local,
}

/// A configuration and where it comes from. Returned by [`Config::resolve`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// What is meant.
    pub config: Config,
    /// Who set each value.
    pub explanation: Explanation,
}

impl Config {
    /// Joins the layers; a later one wins: defaults, `attribute`, `Fairing.toml`, variables, `options`.
    ///
    /// Performs no IO: what it needs of the file system is in `surroundings`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] with every unknown key or variable and every value that cannot be meant, in all layers, also
    /// where a later layer would win; and with the values that won but do not go together.
    ///
    /// # Example
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use fairing_core::config::{Attribute, Config, LaunchOptions, Surroundings};
    ///
    /// let surroundings = Surroundings {
    ///     current: "/project".into(),
    ///     manifest: "/project".into(),
    ///     target: "/project/target".into(),
    ///     file: Some("workers = 2".into()),
    /// };
    /// let env = BTreeMap::from([("FAIRING_WORKERS".to_string(), "4".to_string())]);
    /// let resolved = Config::resolve(&Attribute::NONE, &surroundings, &env, &LaunchOptions::new())?;
    /// assert_eq!(resolved.config.topology.worker_count(), 4);
    /// assert!(resolved.explanation.to_string().starts_with("workers  "));
    /// # Ok::<(), fairing_core::config::ConfigError>(())
    /// ```
    pub fn resolve(
        attribute: &Attribute,
        surroundings: &Surroundings,
        env: &impl Env,
        options: &LaunchOptions,
    ) -> Result<Resolved, ConfigError> {
        let mut raw = RawConfig::default();
        raw.attribute(attribute);
        if let Some(text) = &surroundings.file {
            raw.file(text, &surroundings.manifest);
        }
        raw.variables(env);
        raw.options(options);

        let RawConfig { mut entries, mut problems } = raw;
        entries.sort_by_key(|entry| (layer(&entry.origin).0, KEYS.iter().position(|key| key.name == entry.key.name)));
        let mut config = Self::defaults(surroundings);
        let mut winners = Winners::new(&entries);
        for (place, Entry { key, written, origin }) in entries.iter().enumerate() {
            let base = match origin {
                Origin::Attribute | Origin::File { .. } => &surroundings.manifest,
                _ => &surroundings.current,
            };
            match (key.apply)(&mut config, written, base) {
                Ok(()) => winners.win(place),
                Err(expected) => {
                    let (origin, found) = (origin.clone(), written.to_string());
                    problems.push(Problem::Value { origin, key: key.name, found, expected });
                }
            }
        }
        let broken = |name: &str| problems.iter().any(|it| matches!(it, Problem::Value { key, .. } if *key == name));
        let together = winners.problems(&config, broken);
        problems.extend(together);
        if !problems.is_empty() {
            problems.sort_by_key(|problem| layer(problem.origin()));
            return Err(ConfigError::Invalid { problems });
        }
        let row = |key: &Key| Row { key: key.name, value: (key.show)(&config), origin: winners.origin(key.name) };
        let explanation = Explanation::new(KEYS.iter().map(row).collect());
        Ok(Resolved { config, explanation })
    }

    fn defaults(surroundings: &Surroundings) -> Self {
        Self {
            topology: Topology::new(1, 1),
            mode: Mode::Sync,
            rejoin: Duration::ZERO,
            seed: 0,
            env: Vec::new(),
            data_dir: None,
            target: Target::Local,
            runs: surroundings.target.join("fairing").join("runs"),
            worker: Resources::default(),
            ps: Resources::default(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Local => f.write_str("local"),
        }
    }
}

/// Place of an origin among the layers, and within the file.
fn layer(origin: &Origin) -> (u8, usize) {
    match origin {
        Origin::Default => (0, 0),
        Origin::Attribute => (1, 0),
        Origin::File { line, .. } => (2, *line),
        Origin::Variable(_) => (3, 0),
        Origin::Options => (4, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttributeCpu;
    use expect_test::{Expect, expect};
    use std::collections::BTreeMap;

    /// A full attribute, so that each test shows which layer wins.
    const ATTRIBUTE: Attribute = Attribute {
        workers: Some(2),
        seed: Some(3),
        env: Some(&["HF_HOME"]),
        data: Some("data"),
        worker_cpu: Some(AttributeCpu::Cores(2)),
        ps_memory: Some("512Mi"),
        ..Attribute::NONE
    };

    fn resolve(
        attribute: &Attribute,
        file: &str,
        env: &[(&str, &str)],
        options: &LaunchOptions,
    ) -> Result<Resolved, ConfigError> {
        let surroundings = Surroundings {
            current: "/here".into(),
            manifest: "/project".into(),
            target: "/project/target".into(),
            file: Some(file.to_owned()),
        };
        let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Config::resolve(attribute, &surroundings, &env, options)
    }

    #[track_caller]
    fn explained(file: &str, env: &[(&str, &str)], options: &LaunchOptions, expected: Expect) {
        expected.assert_eq(&resolve(&ATTRIBUTE, file, env, options).unwrap().explanation.to_string());
    }

    #[track_caller]
    fn refused(file: &str, env: &[(&str, &str)], options: &LaunchOptions, expected: Expect) {
        expected.assert_eq(&resolve(&ATTRIBUTE, file, env, options).unwrap_err().to_string());
    }

    #[test]
    fn a_run_without_any_setting_has_the_defaults() {
        let resolved = resolve(&Attribute::NONE, "", &[], &LaunchOptions::new()).unwrap();
        expect![[r#"
            workers                  1                             default
            ps                       1                             default
            mode                     sync                          default
            staleness                -                             default
            rejoin                   0s                            default
            seed                     0                             default
            env                      -                             default
            data                     -                             default
            target                   local                         default
            runs                     /project/target/fairing/runs  default
            resources.worker.cpu     -                             default
            resources.worker.memory  -                             default
            resources.ps.cpu         -                             default
            resources.ps.memory      -                             default
        "#]]
        .assert_eq(&resolved.explanation.to_string());
    }

    #[test]
    fn a_later_layer_wins() {
        explained(
            "",
            &[],
            &LaunchOptions::new(),
            expect![[r#"
                workers                  2                             attribute
                ps                       1                             default
                mode                     sync                          default
                staleness                -                             default
                rejoin                   0s                            default
                seed                     3                             attribute
                env                      HF_HOME                       attribute
                data                     /project/data                 attribute
                target                   local                         default
                runs                     /project/target/fairing/runs  default
                resources.worker.cpu     2                             attribute
                resources.worker.memory  -                             default
                resources.ps.cpu         -                             default
                resources.ps.memory      512Mi                         attribute
            "#]],
        );
        let file = "workers = 3\nseed = 4\ndata = '../shared'\nresources.worker.cpu = '500m'\n[resources.ps]\nmemory = '1GB'\ncpu = 1.5";
        explained(
            file,
            &[],
            &LaunchOptions::new(),
            expect![[r#"
                workers                  3                             /project/Fairing.toml:1
                ps                       1                             default
                mode                     sync                          default
                staleness                -                             default
                rejoin                   0s                            default
                seed                     4                             /project/Fairing.toml:2
                env                      HF_HOME                       attribute
                data                     /project/../shared            /project/Fairing.toml:3
                target                   local                         default
                runs                     /project/target/fairing/runs  default
                resources.worker.cpu     500m                          /project/Fairing.toml:4
                resources.worker.memory  -                             default
                resources.ps.cpu         1500m                         /project/Fairing.toml:7
                resources.ps.memory      1G                            /project/Fairing.toml:6
            "#]],
        );
        let env = [
            ("FAIRING_WORKERS", "5"),
            ("FAIRING_DATA", "./sets"),
            ("FAIRING_ENV", "A, B"),
            ("FAIRING_WORKER_MEMORY", "2Gi"),
            ("FAIRING_PLACEMENT_RANK", "0"),
            ("PATH", "/bin"),
        ];
        explained(
            file,
            &env,
            &LaunchOptions::new(),
            expect![[r#"
                workers                  5                             FAIRING_WORKERS
                ps                       1                             default
                mode                     sync                          default
                staleness                -                             default
                rejoin                   0s                            default
                seed                     4                             /project/Fairing.toml:2
                env                      A,B                           FAIRING_ENV
                data                     /here/sets                    FAIRING_DATA
                target                   local                         default
                runs                     /project/target/fairing/runs  default
                resources.worker.cpu     500m                          /project/Fairing.toml:4
                resources.worker.memory  2Gi                           FAIRING_WORKER_MEMORY
                resources.ps.cpu         1500m                         /project/Fairing.toml:7
                resources.ps.memory      1G                            /project/Fairing.toml:6
            "#]],
        );
        let options = LaunchOptions::new()
            .workers(6)
            .ps(2)
            .mode(Mode::Bounded { staleness: 4 })
            .rejoin(Duration::from_secs(90))
            .seed(u64::MAX)
            .env(["C"])
            .data("sets")
            .target(Target::Local)
            .runs("/runs")
            .worker_resources(Resources { cpu: Some("3".parse().unwrap()), memory: None })
            .ps_resources(Resources { cpu: None, memory: Some("4Gi".parse().unwrap()) });
        explained(
            file,
            &env,
            &options,
            expect![[r#"
                workers                  6                     LaunchOptions
                ps                       2                     LaunchOptions
                mode                     async                 LaunchOptions
                staleness                4                     LaunchOptions
                rejoin                   1m 30s                LaunchOptions
                seed                     18446744073709551615  LaunchOptions
                env                      C                     LaunchOptions
                data                     /here/sets            LaunchOptions
                target                   local                 LaunchOptions
                runs                     /runs                 LaunchOptions
                resources.worker.cpu     3                     LaunchOptions
                resources.worker.memory  2Gi                   FAIRING_WORKER_MEMORY
                resources.ps.cpu         1500m                 /project/Fairing.toml:7
                resources.ps.memory      4Gi                   LaunchOptions
            "#]],
        );
    }

    #[test]
    fn what_is_explained_is_what_is_meant() {
        let Resolved { config, explanation } = resolve(&ATTRIBUTE, "", &[], &LaunchOptions::new()).unwrap();
        assert_eq!(config.topology, Topology::new(2, 1));
        assert_eq!((config.seed, config.env), (3, vec!["HF_HOME".to_owned()]));
        assert_eq!(config.data_dir, Some("/project/data".into()));
        assert_eq!(config.runs, PathBuf::from("/project/target/fairing/runs"));
        assert_eq!(config.worker, Resources { cpu: Some("2".parse().unwrap()), memory: None });
        assert_eq!(config.ps, Resources { cpu: None, memory: Some("512Mi".parse().unwrap()) });
        assert_eq!(explanation.origin("workers"), Some(&Origin::Attribute));
        assert_eq!(explanation.origin("nothing"), None);
    }

    #[test]
    fn every_problem_of_every_layer_is_listed_at_once() {
        let file = "workers = 'two'\nwrokers = 2\nps = -1\nmode = 'asinc'\nrejoin = '30'\n[worker]\ncpu = 2\n[resources.ps]\nmemory = '1Gbb'\nmemroy = 1\n";
        let env = [("FAIRING_WORKER", "2"), ("FAIRING_SEED", "-1"), ("FAIRING_TARGET", "docker"), ("FAIRING_X", "")];
        let options = LaunchOptions::new().env(["A=1"]).rejoin(Duration::from_secs(3601)).runs("");
        refused(
            file,
            &env,
            &options,
            expect![[r#"
                invalid configuration, 15 problems:
                  /project/Fairing.toml:1: `workers` is "two"; expected a whole number from 1
                  /project/Fairing.toml:2: unknown key `wrokers`; did you mean `workers`?
                  /project/Fairing.toml:3: `ps` is -1; expected a whole number from 0
                  /project/Fairing.toml:4: `mode` is "asinc"; expected "sync" or "async"; did you mean "async"?
                  /project/Fairing.toml:5: `rejoin` is "30"; expected a duration such as "30s" or "2m" (a unit is missing)
                  /project/Fairing.toml:6: unknown key `worker`; did you mean `resources.worker`?
                  /project/Fairing.toml:9: `resources.ps.memory` is "1Gbb"; expected a size such as "512Mi" or "2GB"; did you mean "1GB"?
                  /project/Fairing.toml:10: unknown key `resources.ps.memroy`; did you mean `resources.ps.memory`?
                  unknown variable `FAIRING_WORKER`; did you mean `FAIRING_WORKERS`?
                  unknown variable `FAIRING_X`
                  FAIRING_SEED: `seed` is "-1"; expected a whole number from 0
                  FAIRING_TARGET: `target` is "docker"; expected "local" (`docker` comes with a later version)
                  LaunchOptions: `rejoin` is 1h 1s; expected at most "1h"
                  LaunchOptions: `env` is ["A=1"]; expected for "A=1" the name alone, "A"; the value is that of the launcher
                  LaunchOptions: `runs` is ""; expected the path of a folder"#]],
        );
    }

    #[test]
    fn one_problem_is_one_line() {
        let files = [
            "workers = 0",
            "workers = '2'",
            "workers = 4294967296",
            "seed = 1.5",
            "seed = 99999999999999999999999999999999999999999",
            "ps = { cpu = 2 }",
            "mode = 'bounded'",
            "mode = true",
            "staleness = '4'",
            "staleness = -1",
            "rejoin = 30",
            "rejoin = '30 min'",
            "rejoin = '1h 1ms'",
            "env = 'A'",
            "env = ['A', 2]",
            "env = ['A', 'A']",
            "data = true",
            "target = 'kubernetes'",
            "resources.worker.memory = 1024",
            "resources.worker = 2",
            "resources = 2",
            "seed 3",
            "seed = 3\nseed = 3",
        ];
        let variables = [("FAIRING_ENV", "A,FAIRING_SEED"), ("FAIRING_WORKERS", ""), ("FAIRING_PS_CPU", "0")];
        let files = files.map(|file| (file, None)).into_iter();
        let cases = files.chain(variables.map(|variable| ("", Some(variable))));
        let message = |(file, variable): (&str, Option<_>)| {
            let error = resolve(&Attribute::NONE, file, variable.as_slice(), &LaunchOptions::new()).unwrap_err();
            error.to_string().replace("invalid configuration: ", "") + "\n"
        };
        expect![[r#"
            /project/Fairing.toml:1: `workers` is 0; expected a whole number from 1
            /project/Fairing.toml:1: `workers` is "2"; expected the number 2 without quotes
            /project/Fairing.toml:1: `workers` is 4294967296; expected a smaller number
            /project/Fairing.toml:1: `seed` is 1.5; expected a whole number from 0
            /project/Fairing.toml:1: `seed` is a number out of range; expected a whole number from 0
            /project/Fairing.toml:1: `ps` is a table; expected a whole number from 0 (resources go into `[resources.ps]`)
            /project/Fairing.toml:1: `mode` is "bounded"; expected "sync" or "async" (bounded asynchrony is `staleness = 4`)
            /project/Fairing.toml:1: `mode` is `true`; expected "sync" or "async" (bounded asynchrony is `staleness = 4`)
            /project/Fairing.toml:1: `staleness` is "4"; expected the number 4 without quotes
            /project/Fairing.toml:1: `staleness` is -1; expected a whole number from 0
            /project/Fairing.toml:1: `rejoin` is 30; expected a duration such as "30s" or "2m" (a unit is missing)
            /project/Fairing.toml:1: `rejoin` is "30 min"; expected a duration such as "30s" or "2m"
            /project/Fairing.toml:1: `rejoin` is "1h 1ms"; expected at most "1h"
            /project/Fairing.toml:1: `env` is "A"; expected a list of names, such as ["HF_HOME"]
            /project/Fairing.toml:1: `env` is ["A", 2]; expected a list of names, such as ["HF_HOME"]
            /project/Fairing.toml:1: `env` is ["A", "A"]; expected "A" once
            /project/Fairing.toml:1: `data` is `true`; expected the path of a folder
            /project/Fairing.toml:1: `target` is "kubernetes"; expected "local" (`kubernetes` comes with a later version)
            /project/Fairing.toml:1: `resources.worker.memory` is 1024; expected a size such as "512Mi" or "2GB" (a unit is missing)
            /project/Fairing.toml:1: `resources.worker` is 2; expected a table
            /project/Fairing.toml:1: `resources` is 2; expected a table
            /project/Fairing.toml:1: key with no value, expected `=`
            /project/Fairing.toml:2: duplicate key
            FAIRING_ENV: `env` is "A,FAIRING_SEED"; expected for "FAIRING_SEED" a variable of your own (those that start with `FAIRING_` are fairing's)
            FAIRING_WORKERS: `workers` is ""; expected a whole number from 1
            FAIRING_PS_CPU: `resources.ps.cpu` is "0"; expected a number of cores such as 2, "1.5" or "500m"
        "#]].assert_eq(&cases.map(message).collect::<String>());
    }

    /// An attribute, a file, variables and a mode in code.
    type Layers<'a> = (Attribute, &'a str, &'a [(&'a str, &'a str)], Option<Mode>);

    /// What each case says of modes with the place of it, or what is wrong, a line each.
    #[track_caller]
    fn together(cases: &[Layers<'_>], expected: Expect) {
        let line = |(attribute, file, env, mode): &Layers<'_>| {
            let options = mode.iter().copied().fold(LaunchOptions::new(), LaunchOptions::mode);
            let text = match resolve(attribute, file, env, &options) {
                Ok(resolved) => {
                    let rows = resolved.explanation.rows().iter();
                    let rows = rows.filter(|row| ["ps", "mode", "staleness", "rejoin"].contains(&row.key));
                    rows.map(|row| format!("{} {} ({})", row.key, row.value, row.origin)).collect::<Vec<_>>().join("; ")
                }
                Err(error) => error.to_string().replace("invalid configuration: ", ""),
            };
            text.replace("/project/", "") + "\n"
        };
        expected.assert_eq(&cases.iter().map(line).collect::<String>());
    }

    const SYNC: Attribute = Attribute { mode: Some("sync"), ..Attribute::NONE };
    const BOUNDED: Attribute = Attribute { staleness: Some(4), ..Attribute::NONE };
    const SERVERLESS: Attribute = Attribute { ps: Some(0), ..Attribute::NONE };

    #[test]
    fn staleness_alone_means_async() {
        let cases: [Layers<'_>; 4] = [
            (BOUNDED, "rejoin = '2m'", &[], None),
            (Attribute::NONE, "staleness = 0\nmode = 'async'", &[], None),
            (Attribute::NONE, "mode = 'async'", &[("FAIRING_STALENESS", "2")], None),
            (Attribute::NONE, "", &[("FAIRING_MODE", "async")], None),
        ];
        together(
            &cases,
            expect![[r#"
            ps 1 (default); mode async (attribute); staleness 4 (attribute); rejoin 2m (Fairing.toml:1)
            ps 1 (default); mode async (Fairing.toml:2); staleness 0 (Fairing.toml:1); rejoin 0s (default)
            ps 1 (default); mode async (Fairing.toml:1); staleness 2 (FAIRING_STALENESS); rejoin 0s (default)
            ps 1 (default); mode async (FAIRING_MODE); staleness - (default); rejoin 0s (default)
        "#]],
        );
    }

    #[test]
    fn a_later_mode_replaces_mode_and_staleness() {
        let cases: [Layers<'_>; 6] = [
            (BOUNDED, "", &[("FAIRING_MODE", "sync")], None),
            (BOUNDED, "mode = 'async'", &[], None),
            (SYNC, "", &[("FAIRING_MODE", "async"), ("FAIRING_STALENESS", "2")], None),
            (SYNC, "staleness = 3", &[], Some(Mode::Async)),
            (BOUNDED, "", &[("FAIRING_STALENESS", "2")], Some(Mode::Sync)),
            (SYNC, "", &[], Some(Mode::Bounded { staleness: 5 })),
        ];
        together(
            &cases,
            expect![[r#"
            ps 1 (default); mode sync (FAIRING_MODE); staleness - (FAIRING_MODE); rejoin 0s (default)
            ps 1 (default); mode async (Fairing.toml:1); staleness - (Fairing.toml:1); rejoin 0s (default)
            ps 1 (default); mode async (FAIRING_MODE); staleness 2 (FAIRING_STALENESS); rejoin 0s (default)
            ps 1 (default); mode async (LaunchOptions); staleness - (LaunchOptions); rejoin 0s (default)
            ps 1 (default); mode sync (LaunchOptions); staleness - (LaunchOptions); rejoin 0s (default)
            ps 1 (default); mode async (LaunchOptions); staleness 5 (LaunchOptions); rejoin 0s (default)
        "#]],
        );
    }

    #[test]
    fn staleness_over_sync_is_refused_with_both_places() {
        let cases: [Layers<'_>; 4] = [
            (SYNC, "", &[("FAIRING_STALENESS", "2")], None),
            (Attribute::NONE, "staleness = 3\nmode = 'sync'", &[], None),
            (Attribute { staleness: Some(1), ..SYNC }, "", &[], None),
            (SERVERLESS, "mode = 'sync'\nstaleness = 3\nrejoin = '1s'", &[], None),
        ];
        together(
            &cases,
            expect![[r#"
            FAIRING_STALENESS: `staleness` has no meaning with `mode = "sync"` (`mode` is set by attribute)
            Fairing.toml:1: `staleness` has no meaning with `mode = "sync"` (`mode` is set by Fairing.toml:2)
            attribute: `staleness` has no meaning with `mode = "sync"`
            invalid configuration, 2 problems:
              Fairing.toml:2: `staleness` has no meaning with `mode = "sync"` (`mode` is set by Fairing.toml:1)
              Fairing.toml:3: `rejoin` needs a parameter server, since a lost worker would take its share of the parameters with it; set `ps = 1` (`ps` is set by attribute)
        "#]],
        );
    }

    #[test]
    fn without_a_server_there_is_neither_async_nor_rejoin() {
        let cases: [Layers<'_>; 6] = [
            (SERVERLESS, "mode = 'sync'\nrejoin = '0s'", &[], None),
            (SERVERLESS, "rejoin = '1s'", &[("FAIRING_MODE", "async")], None),
            (BOUNDED, "", &[("FAIRING_PS", "0")], None),
            (SERVERLESS, "", &[], Some(Mode::Bounded { staleness: 5 })),
            (SERVERLESS, "", &[("FAIRING_MODE", "async"), ("FAIRING_PS", "1")], None),
            // What was asked for instead of the attribute's 0 is not known.
            (SERVERLESS, "mode = 'async'", &[("FAIRING_PS", "one")], None),
        ];
        together(
            &cases,
            expect![[r#"
            ps 0 (attribute); mode sync (Fairing.toml:1); staleness - (default); rejoin 0s (Fairing.toml:2)
            invalid configuration, 2 problems:
              Fairing.toml:1: `rejoin` needs a parameter server, since a lost worker would take its share of the parameters with it; set `ps = 1` (`ps` is set by attribute)
              FAIRING_MODE: `mode = "async"` needs a parameter server; set `ps = 1` (`ps` is set by attribute)
            attribute: `staleness` needs a parameter server; set `ps = 1` (`ps` is set by FAIRING_PS)
            LaunchOptions: `staleness` needs a parameter server; set `ps = 1` (`ps` is set by attribute)
            ps 1 (FAIRING_PS); mode async (FAIRING_MODE); staleness - (default); rejoin 0s (default)
            FAIRING_PS: `ps` is "one"; expected a whole number from 0
        "#]],
        );
    }

    #[test]
    fn rejoin_counts_whole_milliseconds() {
        let rejoin =
            |time| resolve(&Attribute::NONE, "", &[], &LaunchOptions::new().rejoin(time)).unwrap().config.rejoin;
        assert_eq!(rejoin(Duration::from_micros(1_500_700)), Duration::from_millis(1500));
        assert_eq!(rejoin(Duration::from_secs(3600)), Duration::from_secs(3600));
        assert_eq!(rejoin(Duration::from_micros(999)), Duration::ZERO);
    }

    #[test]
    fn the_examples_of_the_documentation_are_accepted() {
        let rows = include_str!("mod.rs").lines().filter(|line| line.starts_with("//! | `"));
        for row in rows {
            let example = row.split('|').map(str::trim).nth(5).unwrap().trim_matches('`');
            let resolved = resolve(&Attribute::NONE, example, &[], &LaunchOptions::new()).unwrap();
            let (key, _) = example.split_once(" = ").unwrap();
            assert!(matches!(resolved.explanation.origin(key), Some(Origin::File { line: 1, .. })), "{example}");
        }
    }
}
