//! From Prometheus' text, as `http/metrics.rs` writes it, to OTLP's messages.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{
    AnyValue, InstrumentationScope, KeyValue, any_value::Value,
};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource;

/// When a metric's numbers began, and when they were read, in nanoseconds since the Unix epoch.
#[derive(Clone, Copy)]
struct Times {
    started: u64,
    now: u64,
}

/// What the text says of one metric.
#[derive(Debug, Default)]
struct Family<'a> {
    name: &'a str,
    help: &'a str,
    kind: &'a str,
    samples: Vec<Sample<'a>>,
}

/// One line with a number.
#[derive(Debug)]
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, String)>,
    value: f64,
}

/// Makes the message that says what `text` does.
pub(super) fn request(
    text: &str,
    attributes: &[(String, String)],
    started: u64,
    now: u64,
) -> ExportMetricsServiceRequest {
    let times = Times { started, now };
    let metrics = families(text).iter().filter_map(|family| metric(family, times)).collect();
    let attributes = attributes.iter().map(|(name, value)| attribute(name, value)).collect();
    let scope = InstrumentationScope { name: "lacuna".to_string(), ..Default::default() };
    let scoped = ScopeMetrics { scope: Some(scope), metrics, ..Default::default() };
    let resource = Resource { attributes, ..Default::default() };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource),
            scope_metrics: vec![scoped],
            ..Default::default()
        }],
    }
}

fn attribute(name: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(Value::StringValue(value.to_string())) };
    KeyValue { key: name.to_string(), value: Some(value), ..Default::default() }
}

/// Reads the text: each metric's lines stand together, after the line that gives its type.
fn families(text: &str) -> Vec<Family<'_>> {
    let mut out: Vec<Family<'_>> = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let [word, name, value] = [(); 3].map(|()| words.next().unwrap_or_default());
            if out.last().is_none_or(|family| family.name != name) {
                out.push(Family { name, ..Family::default() });
            }
            let family = out.last_mut().expect("just pushed");
            match word {
                "HELP" => family.help = value.trim_end_matches('.'),
                "TYPE" => family.kind = value,
                _ => {}
            }
        } else if let (Some(family), Some(sample)) = (out.last_mut(), sample(line)) {
            family.samples.push(sample);
        }
    }
    out
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = rest.trim().split(' ').next()?.parse().ok()?;
    Some(Sample { name, labels, value })
}

/// Reads `a="x",b="y"}`; returns what follows too.
fn labels(mut rest: &str) -> Option<(Vec<(&str, String)>, &str)> {
    let mut out: Vec<(&str, String)> = Vec::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((out, rest));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let (mut value, mut escaped, mut end) = (String::new(), false, None);
        for (at, c) in quoted.char_indices() {
            match (escaped, c) {
                (true, 'n') => value.push('\n'),
                (true, c) => value.push(c),
                (false, '\\') => {}
                (false, '"') => {
                    end = Some(at);
                    break;
                }
                (false, c) => value.push(c),
            }
            escaped = !escaped && c == '\\';
        }
        out.push((name, value));
        rest = &quoted[end? + 1..];
    }
}

fn metric(family: &Family<'_>, times: Times) -> Option<Metric> {
    if family.samples.is_empty() {
        return None;
    }
    let aggregation_temporality = AggregationTemporality::Cumulative.into();
    let data = match family.kind {
        "counter" => Data::Sum(Sum {
            data_points: numbers(family, times),
            aggregation_temporality,
            is_monotonic: true,
        }),
        "histogram" => Data::Histogram(Histogram {
            data_points: histograms(family, times),
            aggregation_temporality,
        }),
        _ => Data::Gauge(Gauge { data_points: numbers(family, times) }),
    };
    let name = family.name.strip_suffix("_total").unwrap_or(family.name);
    let unit = match name {
        name if name.ends_with("_seconds") => "s",
        name if name.ends_with("_bytes") => "By",
        name if name.ends_with("_ratio") => "1",
        _ => "",
    };
    Some(Metric {
        name: name.to_string(),
        description: family.help.to_string(),
        unit: unit.to_string(),
        data: Some(data),
        ..Default::default()
    })
}

fn attributes(labels: &[(&str, String)]) -> Vec<KeyValue> {
    labels.iter().map(|(name, value)| attribute(name, value)).collect()
}

fn numbers(family: &Family<'_>, times: Times) -> Vec<NumberDataPoint> {
    let point = |sample: &Sample<'_>| NumberDataPoint {
        attributes: attributes(&sample.labels),
        start_time_unix_nano: if family.kind == "counter" { times.started } else { 0 },
        time_unix_nano: times.now,
        value: Some(number_data_point::Value::AsDouble(sample.value)),
        ..Default::default()
    };
    family.samples.iter().map(point).collect()
}

/// Puts the lines of each histogram together; Prometheus' buckets hold those below them too.
fn histograms(family: &Family<'_>, times: Times) -> Vec<HistogramDataPoint> {
    let mut points: BTreeMap<Vec<(&str, String)>, HistogramDataPoint> = BTreeMap::new();
    for sample in &family.samples {
        let of_bucket = |label: &&(&str, String)| label.0 == "le";
        let bound = sample.labels.iter().find(of_bucket).map(|(_, value)| value.clone());
        let labels: Vec<(&str, String)> =
            sample.labels.iter().filter(|label| label.0 != "le").cloned().collect();
        let point = points.entry(labels.clone()).or_insert_with(|| HistogramDataPoint {
            attributes: attributes(&labels),
            start_time_unix_nano: times.started,
            time_unix_nano: times.now,
            ..Default::default()
        });
        match (sample.name.strip_prefix(family.name), bound) {
            (Some("_bucket"), Some(bound)) => {
                let below: u64 = point.bucket_counts.iter().sum();
                point.bucket_counts.push((sample.value as u64).saturating_sub(below));
                if let Some(bound) = bound.parse().ok().filter(|bound: &f64| bound.is_finite()) {
                    point.explicit_bounds.push(bound);
                }
            }
            (Some("_sum"), _) => point.sum = Some(sample.value),
            (Some("_count"), _) => point.count = sample.value as u64,
            _ => {}
        }
    }
    points.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# HELP lacuna_run_loss Mean loss of the newest step.
# TYPE lacuna_run_loss gauge
lacuna_run_loss{run=\"a\"} 0.5
lacuna_run_loss{run=\"b \\\"c\\\\d\\ne\"} 2e-3
# HELP lacuna_run_images_total Images.
# TYPE lacuna_run_images_total counter
lacuna_run_images_total{run=\"a\"} 4096
# HELP lacuna_checkpoint_duration_seconds How long.
# TYPE lacuna_checkpoint_duration_seconds histogram
lacuna_checkpoint_duration_seconds_sum{run=\"a\"} 5.5
lacuna_checkpoint_duration_seconds_count{run=\"a\"} 3
lacuna_checkpoint_duration_seconds_bucket{le=\"1.0\",run=\"a\"} 1
lacuna_checkpoint_duration_seconds_bucket{le=\"2.5\",run=\"a\"} 3
lacuna_checkpoint_duration_seconds_bucket{le=\"+Inf\",run=\"a\"} 3
# HELP lacuna_sessions Workers that are connected.
# TYPE lacuna_sessions gauge
lacuna_sessions 7
";

    #[test]
    fn text_becomes_messages() {
        let owner = [("service.name".to_string(), "x".to_string())];
        let made = request(TEXT, &owner, 5, 9);
        let resource = &made.resource_metrics[0];
        assert_eq!(resource.resource.as_ref().unwrap().attributes[0].key, "service.name");
        let metrics = &resource.scope_metrics[0].metrics;
        let names: Vec<(&str, &str)> =
            metrics.iter().map(|m| (m.name.as_str(), m.unit.as_str())).collect();
        assert_eq!(
            names,
            [
                ("lacuna_run_loss", ""),
                ("lacuna_run_images", ""),
                ("lacuna_checkpoint_duration_seconds", "s"),
                ("lacuna_sessions", "")
            ]
        );
        let Some(Data::Gauge(losses)) = &metrics[0].data else { panic!("{:?}", metrics[0]) };
        let label = losses.data_points[1].attributes[0].value.clone().unwrap().value.unwrap();
        assert_eq!(label, Value::StringValue("b \"c\\d\ne".to_string()));
        let value = losses.data_points[1].value.unwrap();
        assert_eq!(value, number_data_point::Value::AsDouble(2e-3));
        let Some(Data::Sum(images)) = &metrics[1].data else { panic!("{:?}", metrics[1]) };
        assert!(images.is_monotonic);
        assert_eq!(images.data_points[0].start_time_unix_nano, 5);
        let Some(Data::Histogram(durations)) = &metrics[2].data else { panic!("{metrics:?}") };
        let point = &durations.data_points[0];
        assert_eq!((point.count, point.sum), (3, Some(5.5)));
        assert_eq!(point.explicit_bounds, [1.0, 2.5]);
        assert_eq!(point.bucket_counts, [1, 2, 0]);
    }
}
