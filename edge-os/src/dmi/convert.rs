//! Devices and models from custom resources to the messages of the interface.
//!
//! The objects come from [`skerry_edge_core::twin::merge`], so what mappers cannot do without is there. Fields of another
//! type than the custom resource has them are left out: the API refuses such objects.
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dtcommon/util.go.

use serde_json::{Map, Value};
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::{box_map, box_value};

/// A device.
pub(super) fn device(object: &Value) -> dmi::Device {
    let spec = &object["spec"];
    let status = &object["status"];
    dmi::Device {
        name: text(&object["metadata"]["name"]),
        namespace: text(&object["metadata"]["namespace"]),
        spec: Some(dmi::DeviceSpec {
            device_model_reference: text(&spec["deviceModelRef"]["name"]),
            protocol: Some(dmi::ProtocolConfig {
                protocol_name: text(&spec["protocol"]["protocolName"]),
                config_data: Some(box_map(map(&spec["protocol"]["configData"]))),
            }),
            properties: list(&spec["properties"]).map(property).collect(),
            methods: list(&spec["methods"])
                .map(|method| dmi::DeviceMethod {
                    name: text(&method["name"]),
                    description: text(&method["description"]),
                    property_names: list(&method["propertyNames"]).map(text).collect(),
                })
                .collect(),
        }),
        status: Some(dmi::DeviceStatus {
            twins: Vec::new(),
            report_to_cloud: flag(&status["reportToCloud"]),
            report_cycle: number(&status["reportCycle"]),
        }),
    }
}

/// A model.
pub(super) fn model(object: &Value) -> dmi::DeviceModel {
    let property = |property: &Value| dmi::ModelProperty {
        name: text(&property["name"]),
        description: text(&property["description"]),
        r#type: text(&property["type"]),
        access_mode: text(&property["accessMode"]),
        minimum: text(&property["minimum"]),
        maximum: text(&property["maximum"]),
        unit: text(&property["unit"]),
    };
    dmi::DeviceModel {
        name: text(&object["metadata"]["name"]),
        namespace: text(&object["metadata"]["namespace"]),
        spec: Some(dmi::DeviceModelSpec {
            properties: list(&object["spec"]["properties"]).map(property).collect(),
        }),
    }
}

fn property(property: &Value) -> dmi::DeviceProperty {
    let visitors = &property["visitors"];
    let desired = &property["desired"];
    dmi::DeviceProperty {
        name: text(&property["name"]),
        desired: Some(dmi::TwinProperty {
            value: text(&desired["value"]),
            metadata: map(&desired["metadata"])
                .iter()
                .map(|(key, value)| (key.clone(), text(value)))
                .collect(),
        }),
        visitors: Some(dmi::VisitorConfig {
            protocol_name: text(&visitors["protocolName"]),
            config_data: Some(box_map(map(&visitors["configData"]))),
        }),
        report_cycle: number(&property["reportCycle"]),
        collect_cycle: number(&property["collectCycle"]),
        report_to_cloud: flag(&property["reportToCloud"]),
        push_method: Some(&property["pushMethod"]).filter(|push| push.is_object()).map(push),
    }
}

fn push(push: &Value) -> dmi::PushMethod {
    let given = |value: &Value| value.is_object();
    let (http, mqtt, otel) = (&push["http"], &push["mqtt"], &push["otel"]);
    let anomalies = &push["anomalyDetection"];
    dmi::PushMethod {
        http: given(http).then(|| dmi::PushMethodHttp {
            hostname: text(&http["hostName"]),
            port: number(&http["port"]),
            requestpath: text(&http["requestPath"]),
            timeout: number(&http["timeout"]),
        }),
        mqtt: given(mqtt).then(|| dmi::PushMethodMqtt {
            address: text(&mqtt["address"]),
            topic: text(&mqtt["topic"]),
            qos: small(&mqtt["qos"]),
            retained: flag(&mqtt["retained"]),
        }),
        db_method: given(&push["dbMethod"]).then(|| database(&push["dbMethod"])),
        otel: given(otel).then(|| dmi::PushMethodOtel { endpoint_url: text(&otel["endpointURL"]) }),
        anomaly_detection: given(anomalies).then(|| dmi::AnomalyDetection {
            data: map(anomalies)
                .iter()
                .map(|(key, value)| (key.clone(), box_value(value)))
                .collect(),
        }),
    }
}

fn database(database: &Value) -> dmi::DbMethod {
    let given = |value: &Value| value.is_object();
    let influx = &database["influxdb2"];
    let (influx_client, influx_data) =
        (&influx["influxdb2ClientConfig"], &influx["influxdb2DataConfig"]);
    let redis = &database["redis"]["redisClientConfig"];
    let engine = &database["TDEngine"]["TDEngineClientConfig"];
    let mysql = &database["mysql"]["mysqlClientConfig"];
    dmi::DbMethod {
        influxdb2: given(influx).then(|| dmi::DbMethodInfluxdb2 {
            influxdb2_client_config: Some(dmi::Influxdb2ClientConfig {
                url: text(&influx_client["url"]),
                org: text(&influx_client["org"]),
                bucket: text(&influx_client["bucket"]),
            }),
            influxdb2_data_config: Some(dmi::Influxdb2DataConfig {
                measurement: text(&influx_data["measurement"]),
                tag: map(&influx_data["tag"])
                    .iter()
                    .map(|(key, value)| (key.clone(), text(value)))
                    .collect(),
                field_key: text(&influx_data["fieldKey"]),
            }),
        }),
        redis: given(redis).then(|| dmi::DbMethodRedis {
            redis_client_config: Some(dmi::RedisClientConfig {
                addr: text(&redis["addr"]),
                db: small(&redis["db"]),
                poolsize: small(&redis["poolsize"]),
                min_idle_conns: small(&redis["minIdleConns"]),
            }),
        }),
        tdengine: given(engine).then(|| dmi::DbMethodTdEngine {
            td_engine_client_config: Some(dmi::TdEngineClientConfig {
                addr: text(&engine["addr"]),
                dbname: text(&engine["dbName"]),
            }),
        }),
        mysql: given(mysql).then(|| dmi::DbMethodMySql {
            mysql_client_config: Some(dmi::MySqlClientConfig {
                addr: text(&mysql["addr"]),
                database: text(&mysql["database"]),
                user_name: text(&mysql["userName"]),
            }),
        }),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn flag(value: &Value) -> bool {
    value.as_bool().unwrap_or_default()
}

fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_default()
}

fn small(value: &Value) -> i32 {
    i32::try_from(number(value)).unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn map(value: &Value) -> &Map<String, Value> {
    static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    value.as_object().unwrap_or(&EMPTY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use skerry_edge_core::twin::merge;

    #[test]
    fn a_device_arrives_whole_and_what_mappers_cannot_do_without_is_there() {
        let shared = json!({"metadata": {"name": "m", "namespace": "a"}, "spec": {"properties":
            [{"name": "t", "type": "FLOAT", "accessMode": "ReadOnly", "maximum": "16", "unit": "bar"}]}});
        let own = json!({"metadata": {"name": "d", "namespace": "a"}, "spec": {"deviceModelRef": {"name": "m"},
            "protocol": {"protocolName": "modbus", "configData": {"port": "502", "slaveID": 3, "data": 1}},
            "stateReport": {"reportToCloud": true, "reportCycle": 9},
            "methods": [{"name": "x", "propertyNames": ["t"]}],
            "properties": [{"name": "t", "desired": {"value": "4", "metadata": {"type": "float"}}, "collectCycle": 5,
                "pushMethod": {"mqtt": {"address": "tcp://h", "topic": "t", "qos": 1},
                    "dbMethod": {"TDEngine": {"TDEngineClientConfig": {"addr": "a", "dbName": "n"}}}}}, {"name": "u"}]}});
        let told = device(&merge::device(&own, &shared));
        let spec = told.spec.expect("always there");
        let settings = spec.protocol.expect("always there").config_data.expect("always there").data;
        assert_eq!(settings.len(), 3);
        let first = &spec.properties[0];
        assert_eq!(first.desired.as_ref().expect("always there").metadata["type"], "float");
        let push = first.push_method.as_ref().expect("given");
        assert_eq!(push.mqtt.as_ref().expect("given").qos, 1);
        let engine = push.db_method.as_ref().and_then(|db| db.tdengine.as_ref());
        let engine = engine.and_then(|engine| engine.td_engine_client_config.as_ref());
        assert_eq!(engine.expect("given").dbname, "n");
        let second = &spec.properties[1];
        assert!(
            second.desired.is_some()
                && second.visitors.as_ref().is_some_and(|v| v.config_data.is_some())
        );
        assert!(second.push_method.is_none());
        assert_eq!(told.status.expect("always there").report_cycle, 9);
        let told = model(&merge::model(&shared, ["u"].into_iter()));
        let properties = told.spec.expect("always there").properties;
        assert_eq!((properties[0].unit.as_str(), properties[1].r#type.as_str()), ("bar", "STRING"));
    }
}
